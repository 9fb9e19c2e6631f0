package controller

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

func TestKindOf(t *testing.T) {
	for _, tt := range []struct {
		apiVersion, kind string
		want             ownerKind
		// why is part of the sentence for those that cannot move.
		why string
	}{
		{"apps/v1", "ReplicaSet", set, ""},
		{"apps/v1beta2", "ReplicaSet", set, ""},
		{"v1", "ReplicationController", set, ""},
		{"podmig.dev/v1alpha1", "MigratingPod", migratingPod, ""},
		{"podmig.dev/v2", "MigratingPod", migratingPod, ""},
		{"apps/v1", "StatefulSet", stranger, "belongs to StatefulSet x, whose pods have fixed names"},
		{"apps/v1", "DaemonSet", stranger, "belongs to DaemonSet x, whose pods belong to their nodes"},
		{"batch/v1", "Job", stranger, "belongs to Job x, which would count it as failed"},
		{"v1", "Node", stranger, "belongs to Node x, which would replace it"},
		// Kinds are told apart by their groups.
		{"example.com/v1", "ReplicaSet", stranger, "which would replace it"},
		{"example.com/v1", "MigratingPod", stranger, "which would replace it"},
		{"apps/v1", "ReplicationController", stranger, "which would replace it"},
	} {
		ref := &metav1.OwnerReference{APIVersion: tt.apiVersion, Kind: tt.kind, Name: "x"}
		if got := kindOf(ref); got != tt.want {
			t.Errorf("%s %s is %v, want %v", tt.apiVersion, tt.kind, got, tt.want)
		}
		if got := immovable("p", ref); (got == "") != (tt.why == "") || !strings.Contains(got, tt.why) {
			t.Errorf("%s %s: %q", tt.apiVersion, tt.kind, got)
		}
	}
	if kindOf(nil) != nobody || immovable("p", nil) != "" {
		t.Error("a pod without a controller can be moved")
	}
}

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		owner, pod string
		// want is the number, -1 for none.
		want int
	}{
		{"x", "x-0", 0},
		{"x", "x-12", 12},
		{"x-1", "x-1-2", 2},
		{"my-redis", "my-redis-3", 3},
		{"x", "x-1-2", -1},
		{"x", "x-07", -1},
		{"x", "x--1", -1},
		{"x", "x-+1", -1},
		{"x", "x-", -1},
		{"x", "x", -1},
		{"x", "x-abc", -1},
		{"x", "y-1", -1},
		{"x", "xy-1", -1},
		{"x", "x-99999999999999999999", -1},
	} {
		n, ok := numberOf(tt.owner, tt.pod)
		if ok != (tt.want >= 0) || ok && n != tt.want {
			t.Errorf("%s of %s: %d %v, want %d", tt.pod, tt.owner, n, ok, tt.want)
		}
	}
	for _, tt := range []struct{ pods, want string }{
		{"", "x-0"},
		{"x-0", "x-1"},
		{"x-3 x-10 x-9", "x-11"},
		{"x-07 x-1-2 y-5 x", "x-0"},
		{"x-99999999999999999999 x-4", "x-5"},
	} {
		if got := nextName("x", strings.Fields(tt.pods)...); got != tt.want {
			t.Errorf("after %q comes %s, want %s", tt.pods, got, tt.want)
		}
	}
}

func TestOwnerGone(t *testing.T) {
	for name, tt := range map[string]struct {
		sets []client.Object
		want bool
	}{
		"there":         {[]client.Object{replicaSet()}, false},
		"not there":     {nil, true},
		"another one":   {[]client.Object{replicaSet(another)}, true},
		"being deleted": {[]client.Object{replicaSet(ending)}, true},
	} {
		w, p := newWorld(t, tt.sets...), changed(sourcePod(), ofSet)
		if got, err := ownerGone(t.Context(), w.Client, ns, metav1.GetControllerOf(p)); err != nil || got != tt.want {
			t.Errorf("%s: gone %v, %v", name, got, err)
		}
	}
}

func TestChildren(t *testing.T) {
	named := func(name, namespace string, changes ...func(*corev1.Pod)) *corev1.Pod {
		p := changed(sourcePod(), changes...)
		p.Name, p.Namespace = name, namespace
		return p
	}
	ours, theirs := owner("podmig.dev/v1alpha1", "MigratingPod", "redis"), owner("podmig.dev/v1alpha1", "MigratingPod", "other")
	guest := func(p *corev1.Pod) { ours(p); p.OwnerReferences[0].Controller = nil }
	w := newWorld(t, named("a", ns, ours), named("b", ns, theirs), named("c", ns), named("d", "elsewhere", ours), named("e", ns, guest), named("f", ns, ours))
	all, err := children(t.Context(), w.Client, ns, &metav1.OwnerReference{UID: "uid-of-redis"})
	if err != nil || len(all) != 2 || all[0].Name != "a" || all[1].Name != "f" {
		t.Errorf("children %v, %v", all, err)
	}
}

func TestArriving(t *testing.T) {
	for _, tt := range []struct {
		name, source, cloned string
		phase                corev1.PodPhase
		want                 bool
	}{
		{"no clone", "", "", corev1.PodPending, false},
		{"not taken over", "redis", "Unknown", corev1.PodPending, true},
		{"no condition yet", "redis", "", corev1.PodPending, true},
		{"taken over, phase not written", "redis", "True", corev1.PodPending, true},
		{"runs", "redis", "True", corev1.PodRunning, false},
	} {
		p := &corev1.Pod{Status: corev1.PodStatus{Phase: tt.phase}}
		p.Annotations = map[string]string{v1alpha1.AnnotationSource: tt.source}
		if tt.cloned != "" {
			p.Status.Conditions = []corev1.PodCondition{{Type: v1alpha1.ConditionCloned, Status: corev1.ConditionStatus(tt.cloned)}}
		}
		if got := arriving(p); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func TestCut(t *testing.T) {
	for _, tt := range []struct{ name, want string }{{"abc", "abc"}, {"abcd", "abcd"}, {"abcde", "abcd"}, {"abc-e", "abc"}, {"a-.-e", "a"}} {
		if got := cut(tt.name, 4); got != tt.want {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}
