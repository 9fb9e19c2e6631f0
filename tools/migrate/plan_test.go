package migrate

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// pod runs on node1; its UID is its name.
func pod(name string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name), Labels: map[string]string{}, Annotations: map[string]string{}},
		Spec:       corev1.PodSpec{NodeName: "node1"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func of(apiVersion, kind string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		yes := true
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: "owner", Controller: &yes}}
	}
}

func phase(ph corev1.PodPhase) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Status.Phase = ph }
}

func app(name string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Labels["app"] = name } }

func cloned(status corev1.ConditionStatus) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Annotations[v1alpha1.AnnotationSource] = "source"
		p.Status.Conditions = []corev1.PodCondition{{Type: v1alpha1.ConditionCloned, Status: status}}
	}
}

func mirror(p *corev1.Pod) { p.Annotations[corev1.MirrorPodAnnotationKey] = "x" }

func deleted(p *corev1.Pod) {
	now := metav1.Now()
	p.DeletionTimestamp, p.Finalizers = &now, []string{v1alpha1.FinalizerMigrate}
}

// order is a migration of a pod; its UID is its name.
func order(name, pod string, ph v1alpha1.Phase, source types.UID) *v1alpha1.PodMigration {
	m := &v1alpha1.PodMigration{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name)}, Spec: v1alpha1.PodMigrationSpec{PodName: pod}}
	m.Status.Phase, m.Status.SourcePodUID = ph, source
	return m
}

func hasClone(m *v1alpha1.PodMigration) *v1alpha1.PodMigration {
	m.Status.ClonePodName = "clone"
	return m
}

func isReady(p *corev1.Pod) {
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
}

func budget(name, app string, allowed int32) *policyv1.PodDisruptionBudget {
	b := &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name)}}
	b.Spec.Selector = metav1.SetAsLabelSelector(labels.Set{"app": app})
	b.Status.DisruptionsAllowed = allowed
	return b
}

func TestFit(t *testing.T) {
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		want standing
		text string
	}{
		{"no controller", pod("p"), ready, ""},
		{"ReplicaSet", pod("p", of("apps/v1", "ReplicaSet")), ready, ""},
		{"ReplicationController", pod("p", of("v1", "ReplicationController")), ready, ""},
		{"MigratingPod", pod("p", of("podmig.dev/v1alpha1", "MigratingPod")), ready, ""},
		{"a ReplicaSet of somebody else", pod("p", of("example.com/v1", "ReplicaSet")), staying, "ReplicaSet owner"},
		{"StatefulSet", pod("p", of("apps/v1", "StatefulSet")), staying, "StatefulSet owner"},
		{"Job", pod("p", of("batch/v1", "Job")), staying, "Job owner"},
		{"Job that is done", pod("p", of("batch/v1", "Job"), phase(corev1.PodSucceeded)), skipped, ""},
		{"DaemonSet", pod("p", of("apps/v1", "DaemonSet")), belonging, "DaemonSet owner"},
		{"static", pod("p", mirror, of("v1", "Node")), belonging, "static pod"},
		{"not running", pod("p", phase(corev1.PodPending)), staying, "Pending"},
		{"failed", pod("p", phase(corev1.PodFailed)), skipped, ""},
		{"being deleted", pod("p", deleted), waiting, "being deleted"},
		{"a clone on its way", pod("p", cloned(corev1.ConditionUnknown), phase(corev1.PodPending)), waiting, "clone"},
		{"a clone that has taken over", pod("p", cloned(corev1.ConditionTrue)), ready, ""},
	} {
		if got, why := fit(tt.pod); got != tt.want || !strings.Contains(why, tt.text) || (why == "") != (tt.text == "") {
			t.Errorf("%s: %v %q, want %v %q", tt.name, got, why, tt.want, tt.text)
		}
	}
}

// text has a line for each pod that is not skipped.
func text(rows []row) string {
	name := map[standing]string{belonging: "belongs", staying: "stays", rejected: "rejected", waiting: "waits", ready: "starts", moving: "moves", ended: "ended"}
	var out []string
	for _, r := range rows {
		if r.standing != skipped {
			out = append(out, r.pod.Name+" "+name[r.standing])
		}
	}
	return strings.Join(out, ", ")
}

func TestRows(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(s *observed)
		want   string
	}{
		{"all at once without budgets", func(*observed) {}, "a starts, b starts, c starts"},
		{"as many as a budget allows", func(s *observed) { s.seeBudget(budget("web", "web", 2), false) }, "a starts, b starts, c waits"},
		{"no more than it allowed at first", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.seeBudget(budget("web", "web", 2), false)
		}, "a starts, b waits, c waits"},
		{"one if it allowed none at first", func(s *observed) {
			s.seeBudget(budget("web", "web", 0), false)
			s.seeBudget(budget("web", "web", 2), false)
		}, "a starts, b waits, c waits"},
		{"none if it allows none", func(s *observed) { s.seeBudget(budget("web", "web", 0), false) }, "a waits, b waits, c waits"},
		{"a budget of other pods", func(s *observed) { s.seeBudget(budget("db", "db", 0), false) }, "a starts, b starts, c starts"},
		{"a budget of another namespace", func(s *observed) {
			b := budget("web", "web", 0)
			b.Namespace = "other"
			s.seeBudget(b, false)
		}, "a starts, b starts, c starts"},
		{"all of its budgets", func(s *observed) {
			s.seeBudget(budget("one", "web", 2), false)
			s.seeBudget(budget("two", "web", 1), false)
		}, "a starts, b waits, c waits"},
		{"a budget that is deleted", func(s *observed) {
			s.seeBudget(budget("web", "web", 0), false)
			s.seeBudget(budget("web", "web", 0), true)
		}, "a starts, b starts, c starts"},
		{"a budget that nobody has counted yet", func(s *observed) {
			b := budget("web", "web", 3)
			b.Generation = 1
			s.seeBudget(b, false)
		}, "a waits, b waits, c waits"},
		{"those under way count", func(s *observed) {
			s.seeBudget(budget("web", "web", 2), false)
			s.order(s.pods["a"], order("a-1", "a", "", ""))
		}, "a moves, b starts, c waits"},
		{"those that have ended do not", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.order(s.pods["a"], order("a-1", "a", v1alpha1.PhaseRefused, "a"))
		}, "a ended, b starts, c waits"},
		{"a clone that is not ready yet counts", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.order(s.pods["a"], hasClone(order("a-1", "a", v1alpha1.PhaseSucceeded, "a")))
			s.seeClone(pod("clone"), false)
		}, "a ended, b waits, c waits"},
		{"a clone that is ready does not", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.order(s.pods["a"], hasClone(order("a-1", "a", v1alpha1.PhaseSucceeded, "a")))
			s.seeClone(pod("clone", isReady), false)
		}, "a ended, b starts, c waits"},
		{"neither does one that is gone", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.order(s.pods["a"], hasClone(order("a-1", "a", v1alpha1.PhaseSucceeded, "a")))
			s.seeClone(pod("clone"), true)
		}, "a ended, b starts, c waits"},
		{"nor one from before", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.seeMigration(hasClone(order("x-1", "x", v1alpha1.PhaseSucceeded, "x")), false)
			s.seeClone(pod("clone"), false)
		}, "a starts, b waits, c waits"},
		{"neither do those whose migration is gone", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.order(s.pods["a"], order("a-1", "a", "", ""))
			s.seeMigration(order("a-1", "a", v1alpha1.PhasePending, "a"), true)
		}, "a ended, b starts, c waits"},
		{"those of other nodes count", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.seeMigration(order("x-1", "x", v1alpha1.PhaseFreezing, "x"), false)
			s.elsewhere["x-1"] = labels.Set{"app": "web"}
		}, "a waits, b waits, c waits"},
		{"those of other nodes with other labels do not", func(s *observed) {
			s.seeBudget(budget("web", "web", 1), false)
			s.seeMigration(order("x-1", "x", v1alpha1.PhaseFreezing, "x"), false)
			s.elsewhere["x-1"] = labels.Set{}
		}, "a starts, b waits, c waits"},
		{"somebody moves a pod already", func(s *observed) {
			s.seeMigration(order("a-1", "a", v1alpha1.PhasePending, ""), false)
		}, "a waits, b starts, c starts"},
		{"somebody has moved a pod", func(s *observed) {
			s.seeMigration(order("a-1", "a", v1alpha1.PhaseSucceeded, "a"), false)
		}, "b starts, c starts"},
		{"an old migration that failed is nothing to us", func(s *observed) {
			s.seeMigration(order("a-1", "a", v1alpha1.PhaseRefused, "a"), false)
		}, "a starts, b starts, c starts"},
		{"neither is one of a pod with the same name", func(s *observed) {
			s.seeMigration(order("a-1", "a", v1alpha1.PhaseFreezing, "other"), false)
		}, "a starts, b starts, c starts"},
		{"one that is gone", func(s *observed) { s.seePod(s.pods["a"], true) }, "b starts, c starts"},
		{"one that is gone because it has moved", func(s *observed) {
			s.order(s.pods["a"], order("a-1", "a", v1alpha1.PhaseSucceeded, "a"))
			s.seePod(s.pods["a"], true)
		}, "a ended, b starts, c starts"},
		{"the API server takes no migration", func(s *observed) { s.rejected["b"] = "No." }, "a starts, b rejected, c starts"},
	} {
		s := newObserved()
		for _, name := range []string{"c", "a", "b"} {
			s.seePod(pod(name, app("web")), false)
		}
		tt.change(s)
		if got := text(s.rows()); got != tt.want {
			t.Errorf("%s: %s; want %s", tt.name, got, tt.want)
		}
	}
}

// Whatever ends in whatever order, a budget's pods under way never exceed it, and all move.
func TestBudgetIsKept(t *testing.T) {
	s := newObserved()
	s.seeBudget(budget("web", "web", 3), false)
	for i := range 10 {
		s.seePod(pod(fmt.Sprintf("web-%d", i), app("web")), false)
	}
	for step := 0; ; step++ {
		var under []*corev1.Pod
		for _, r := range s.rows() {
			switch r.standing {
			case ready:
				s.order(r.pod, order("m-"+r.pod.Name, r.pod.Name, "", ""))
				under = append(under, r.pod)
			case moving:
				under = append(under, r.pod)
			}
		}
		if len(under) > 3 {
			t.Fatalf("step %d: %d under way", step, len(under))
		}
		if len(under) == 0 {
			break
		}
		p := under[step%len(under)]
		s.seeMigration(order("m-"+p.Name, p.Name, v1alpha1.PhaseSucceeded, p.UID), false)
	}
	if n := count(s.rows()); n[ended] != 10 {
		t.Errorf("not all have moved: %s", text(s.rows()))
	}
}

func TestHeldSaysWhich(t *testing.T) {
	s := newObserved()
	s.seeBudget(budget("web", "web", 0), false)
	s.seePod(pod("a", app("web")), false)
	if rows := s.rows(); !strings.Contains(rows[0].why, "PodDisruptionBudget web holds it back: it allows 0, and 0") {
		t.Errorf("it says %q", rows[0].why)
	}
}

func TestUnknown(t *testing.T) {
	s := newObserved()
	s.seePod(pod("a"), false)
	s.seeMigration(order("a-1", "a", v1alpha1.PhaseFreezing, ""), false)
	s.seeMigration(order("x-1", "x", v1alpha1.PhaseFreezing, ""), false)
	s.seeMigration(order("y-1", "y", v1alpha1.PhaseSucceeded, ""), false)
	if len(s.unknown()) != 0 {
		t.Error("nobody needs labels without a budget")
	}
	s.seeBudget(budget("web", "web", 0), false)
	if u := s.unknown(); len(u) != 1 || u[0].Name != "x-1" {
		t.Errorf("it asks for %v", u)
	}
	s.elsewhere["x-1"] = nil
	if len(s.unknown()) != 0 {
		t.Error("it asks twice")
	}
}

func TestVerdict(t *testing.T) {
	end := func(p v1alpha1.Phase) row { return row{standing: ended, migration: order("m", "p", p, "p")} }
	for _, tt := range []struct {
		rows []row
		code int
		text string
	}{
		{nil, 0, ""},
		{[]row{end(v1alpha1.PhaseSucceeded), {standing: belonging}, {standing: skipped}, {standing: moving}}, 0, ""},
		{[]row{end(v1alpha1.PhaseSucceeded), {standing: staying}}, 3, "1 moved, 1 cannot be moved"},
		{[]row{{standing: waiting}, {standing: waiting}}, 3, "2 held back"},
		{[]row{{standing: rejected}}, 3, "1 not ordered"},
		{[]row{end(v1alpha1.PhaseRefused), end(v1alpha1.PhaseRolledBack)}, 4, "1 rolled back, 1 refused"},
		{[]row{end(v1alpha1.PhaseFailed), end(v1alpha1.PhaseRolledBack), {standing: staying}}, 5, "1 lost"},
		{[]row{end(v1alpha1.PhaseCancelled)}, 6, "1 cancelled"},
		{[]row{end(v1alpha1.PhaseCancelled), end(v1alpha1.PhaseRefused)}, 3, "1 refused, 1 cancelled"},
	} {
		err := verdict("node1", tt.rows)
		if ExitCode(err) != tt.code || err != nil && !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%v: code %d; want %d and %q", err, ExitCode(err), tt.code, tt.text)
		}
	}
}

func TestExitCode(t *testing.T) {
	refused := &EndedError{Phase: v1alpha1.PhaseRefused}
	for want, err := range map[int]error{0: nil, 1: errors.New("x"), 3: errors.Join(fmt.Errorf("of a pod: %w", refused)), 4: &NodeError{code: 4}} {
		if got := ExitCode(err); got != want {
			t.Errorf("%v: %d, want %d", err, got, want)
		}
	}
}
