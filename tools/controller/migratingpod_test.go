package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// keep reconciles the MigratingPod until a call changes nothing, and returns it with the
// last error.
func (w *world) keep() (*v1alpha1.MigratingPod, error) {
	w.Helper()
	mp := &v1alpha1.MigratingPod{}
	for range 10 {
		before := mp.ResourceVersion
		_, err := w.mp.Reconcile(w.Context(), request("redis"))
		mp = &v1alpha1.MigratingPod{}
		if err := w.Get(w.Context(), request("redis").NamespacedName, mp); err != nil {
			w.Fatal(err)
		}
		if mp.ResourceVersion == before {
			return mp, err
		}
	}
	w.Fatal("the reconciler does not come to rest")
	return nil, nil
}

// kept is keep without an error.
func (w *world) kept() *v1alpha1.MigratingPod {
	w.Helper()
	mp, err := w.keep()
	if err != nil {
		w.Fatal(err)
	}
	return mp
}

// turn lets all controllers work until nothing changes, and returns the MigratingPod.
func (w *world) turn() *v1alpha1.MigratingPod {
	w.Helper()
	before := ""
	for range 20 {
		mp := w.kept()
		var pods corev1.PodList
		var moves v1alpha1.PodMigrationList
		for _, list := range []client.ObjectList{&pods, &moves} {
			if err := w.List(w.Context(), list); err != nil {
				w.Fatal(err)
			}
		}
		var versions []string
		for _, p := range pods.Items {
			versions = append(versions, p.Name+p.ResourceVersion)
			if _, err := w.d.Reconcile(w.Context(), request(p.Name)); err != nil {
				w.Fatal(err)
			}
		}
		for _, m := range moves.Items {
			versions = append(versions, m.Name+m.ResourceVersion)
			if _, err := w.r.Reconcile(w.Context(), request(m.Name)); err != nil {
				w.Fatal(err)
			}
		}
		after := fmt.Sprint(versions, mp.ResourceVersion)
		if after == before {
			return mp
		}
		before = after
	}
	w.Fatal("the controllers do not come to rest")
	return nil
}

// status is the state, the active pod and the number of moves.
func status(mp *v1alpha1.MigratingPod) string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %d", mp.Status.State, mp.Status.ActivePod, mp.Status.Moves))
}

// is tells the status and the reason of a condition.
func is(mp *v1alpha1.MigratingPod, name string) string {
	c := apimeta.FindStatusCondition(mp.Status.Conditions, name)
	if c == nil {
		return ""
	}
	return string(c.Status) + " " + c.Reason
}

// family are pods of the MigratingPod, each "number[<source] [flags]" on the node of its
// number; the API server of the flag deleted has told the kubelet to end it.
func family(t *testing.T, text string) (pods []client.Object) {
	t.Helper()
	for one := range strings.SplitSeq(text, ", ") {
		f := strings.Fields(one)
		if len(f) == 0 {
			continue
		}
		number, of, clone := strings.Cut(f[0], "<")
		p := changed(sourcePod(), ofRedis)
		if slices.Contains(f, "waits") || slices.Contains(f, "deleted") {
			p = waiting(ofRedis)
		}
		p.Name, p.UID, p.Spec.NodeName = "redis-"+number, types.UID("uid-"+number), "node"+number
		if clone {
			cloneOf("redis-"+of, "Unknown")(p)
		}
		for _, flag := range f[1:] {
			switch flag {
			case "waits":
			case "deleted":
				p.Finalizers = []string{other}
			case "pending":
				p.Status.Phase = corev1.PodPending
			case "failed":
				p.Status.Phase = corev1.PodFailed
			case "succeeded":
				p.Status.Phase = corev1.PodSucceeded
			case "cloned":
				cloneOf("redis-"+of, "True")(p)
			case "ready":
				p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
			case "unschedulable":
				p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "No node fits."})
			default:
				t.Fatalf("flag %s", flag)
			}
		}
		pods = append(pods, p)
	}
	return pods
}

func TestFirstStart(t *testing.T) {
	w := newWorld(t, migratingRedis())
	mp := w.kept()
	if got := fmt.Sprint(w.pods()); got != "[redis-0]" || status(mp) != "Creating redis-0 0" || mp.Status.ObservedGeneration != 1 {
		t.Fatalf("pods %s, status %+v", got, mp.Status)
	}
	if is(mp, v1alpha1.ConditionColdStarted) != "False FirstStart" || is(mp, v1alpha1.ConditionReady) != "False PodNotReady" || w.events() != "" {
		t.Errorf("conditions %v", mp.Status.Conditions)
	}
	p := w.pod("redis-0")
	if !deferral.HasFinalizer(p) || !slices.Contains(p.Finalizers, other) || !metav1.IsControlledBy(p, mp) {
		t.Errorf("finalizers %v, owners %v", p.Finalizers, p.OwnerReferences)
	}
	if got := p.Annotations; len(got) != 2 || got[v1alpha1.AnnotationDeadline] != "120" || got["example.com/note"] != "kept" {
		t.Errorf("annotations %v", got)
	}
	if got := p.Spec.NodeSelector; p.Labels["app"] != "redis" || len(got) != 2 || got["zone"] != "a" || got["disk"] != "fast" {
		t.Errorf("labels %v, node selector %v", p.Labels, got)
	}
	// The template stays what it is.
	if tmpl := mp.Spec.Template; len(tmpl.Finalizers) != 1 || len(tmpl.Annotations) != 1 || len(tmpl.Spec.NodeSelector) != 1 {
		t.Errorf("the template is now %+v", tmpl)
	}
	w.runs("redis-0", "node1")
	if mp = w.kept(); status(mp) != "Running redis-0 0" || mp.Status.NodeName != "node1" || is(mp, v1alpha1.ConditionReady) != "True PodReady" {
		t.Errorf("it runs: %+v", mp.Status)
	}
}

// A template that says nothing gives a pod that has what it needs.
func TestPodOfEmptyTemplate(t *testing.T) {
	mp := &v1alpha1.MigratingPod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "redis"}}
	if p := podOf(mp, "redis-0"); fmt.Sprint(p.Finalizers) != "[podmig.dev/migrate]" || len(p.Annotations) != 0 || p.Spec.NodeSelector != nil {
		t.Errorf("the pod is %+v", p)
	}
	mp.Spec.NodeSelector = map[string]string{"disk": "fast"}
	mp.Spec.Template.Spec.NodeSelector = map[string]string{"disk": "slow"}
	if p := podOf(mp, "redis-0"); p.Spec.NodeSelector["disk"] != "fast" || mp.Spec.Template.Spec.NodeSelector["disk"] != "slow" {
		t.Errorf("node selector %v", p.Spec.NodeSelector)
	}
}

// What a family of pods is called.
func TestStates(t *testing.T) {
	for _, tt := range []struct {
		name, pods string
		// last is the active pod so far.
		last string
		want string
		says string
		// left are the pods that are there afterwards, if others.
		left string
	}{
		{"starts", "0 pending", "0", "Creating redis-0 0", "", ""},
		{"waits for a node", "0 pending unschedulable", "0", "Creating redis-0 0", "No node fits.", ""},
		{"runs", "0", "0", "Running redis-0 0", "", ""},
		{"is to move", "0 waits", "0", "MigrationPending redis-0 0", "", ""},
		{"moves by hand", "0, 1<0 pending", "0", "Migrating redis-0 0", "", ""},
		{"moves", "0 waits, 1<0 pending", "0", "Migrating redis-0 0", "", ""},
		{"could not move", "0 waits, 1<0 failed", "0", "MigrationPending redis-0 0", "", ""},
		{"could not move by hand", "0, 1<0 failed", "0", "Running redis-0 0", "", "redis-0"},
		{"has just moved", "0 waits, 1<0 pending cloned", "0", "Migrating redis-1 1", "", ""},
		{"has moved, the source does not know", "0 waits, 1<0 cloned", "0", "Running redis-1 1", "", ""},
		{"has moved", "0 failed, 1<0 cloned", "0", "Running redis-1 1", "", "redis-1"},
		{"the source ends first", "0 failed, 1<0 pending", "0", "Migrating redis-0 0", "", ""},
		{"moved before", "1<0 cloned", "1", "Running redis-1 0", "", ""},
		{"is to move on", "0 failed, 1<0 cloned waits", "0", "MigrationPending redis-1 1", "", ""},
		{"moves on", "1<0 cloned waits, 2<1 pending", "1", "Migrating redis-1 0", "", ""},
		{"both wait", "0 waits, 1<0 pending waits", "0", "Migrating redis-0 0", "", ""},
		{"ends", "0 deleted", "0", "Creating redis-0 0", "Waits until pod redis-0 has ended. If its node node0 is lost", ""},
		{"ends beside one that has ended", "0 failed, 1 deleted", "1", "Creating redis-1 0", "Waits until pod redis-1 has ended.", ""},
		{"was never written down", "3", "", "Running redis-3 0", "", ""},
		{"two", "0, 1", "0", "Invalid redis-0 0", "There are 2 pods and there should be one: redis-0, redis-1.", ""},
		{"three", "0, 1, 7 pending", "0", "Invalid redis-0 0", "There are 3 pods and there should be one: redis-0, redis-1, redis-7.", ""},
		{"two that wait", "0 waits, 1 waits", "0", "Invalid redis-0 0", "There are 2 pods", ""},
		{"two clones", "0, 1<0 pending, 2<0 pending", "0", "Migrating redis-0 0", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mp := migratingRedis()
			if tt.last != "" {
				mp.Status.ActivePod = "redis-" + tt.last
			}
			w := newWorld(t, append(family(t, tt.pods), mp)...)
			before := fmt.Sprint(w.pods())
			mp = w.kept()
			if got := status(mp); got != tt.want || !strings.HasPrefix(mp.Status.Message, tt.says) || tt.says == "" && mp.Status.Message != "" {
				t.Errorf("it is %s: %q, want %s", got, mp.Status.Message, tt.want)
			}
			if tt.left != "" {
				before = "[" + tt.left + "]"
			}
			if got := fmt.Sprint(w.pods()); got != before {
				t.Errorf("pods %s, want %s", got, before)
			}
			if said := w.events(); said != "" {
				t.Errorf("it says %q", said)
			}
		})
	}
}

// Why a pod still waits is what its last migration says.
func TestMigrationPendingSaysWhy(t *testing.T) {
	move := func(name string, age int64, source types.UID, message string) *v1alpha1.PodMigration {
		m := migration(name)
		m.CreationTimestamp = metav1.NewTime(time.Unix(1000-age, 0))
		m.Status = v1alpha1.PodMigrationStatus{Phase: v1alpha1.PhaseRolledBack, SourcePodUID: source, Message: message}
		return m
	}
	w := newWorld(t, append(family(t, "0 waits"), migratingRedis(),
		move("a", 30, "uid-0", "The first."), move("b", 10, "uid-0", "The last."), move("c", 20, "uid-0", "The second."), move("d", 1, "uid-of-another", "Another's."))...)
	if mp := w.kept(); status(mp) != "MigrationPending redis-0 0" || mp.Status.Message != "The last." {
		t.Errorf("it is %s: %q", status(mp), mp.Status.Message)
	}
}

// A reconciler that stopped at any write goes on without making a second pod, and does
// not forget that one was started without the state of the last.
func TestStartsOnce(t *testing.T) {
	w := newWorld(t, migratingRedis())
	stops := func() {
		for i := range 4 {
			n := 0
			stop := func() error {
				if n++; n > i {
					return fmt.Errorf("stopped")
				}
				return nil
			}
			w.mp.Client = interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
				Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
					if err := stop(); err != nil {
						return err
					}
					return c.Create(ctx, o, opts...)
				},
				SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
					if err := stop(); err != nil {
						return err
					}
					return c.SubResource(sub).Patch(ctx, o, p, opts...)
				},
			})
			_, _ = w.mp.Reconcile(t.Context(), request("redis"))
		}
		w.mp.Client = w.Client
	}
	stops()
	if mp := w.kept(); fmt.Sprint(w.pods()) != "[redis-0]" || status(mp) != "Creating redis-0 0" || is(mp, v1alpha1.ConditionColdStarted) != "False FirstStart" {
		t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
	}
	w.runs("redis-0", "node1")
	w.kept()
	w.says("redis-0", func(s *corev1.PodStatus) { s.Phase, s.Reason = corev1.PodFailed, "Evicted" })
	stops()
	if mp := w.kept(); fmt.Sprint(w.pods()) != "[redis-0 redis-1]" || status(mp) != "Creating redis-1 0" || is(mp, v1alpha1.ConditionColdStarted) != "True Evicted" {
		t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
	}
	if said := w.events(); !strings.Contains(said, "ColdStarted Pod redis-0 has ended") {
		t.Errorf("it says %q", said)
	}
}

func TestColdStart(t *testing.T) {
	for _, tt := range []struct {
		name, pods, last string
		// status is that of the last pod.
		status       corev1.PodStatus
		reason, says string
		pod          string
	}{
		{"evicted", "0 failed", "0", corev1.PodStatus{Reason: "Evicted", Message: "The node was low on memory."}, "Evicted",
			"Pod redis-0 has ended without having moved (The node was low on memory.); redis-1 was started from the template", "redis-1"},
		{"ended by itself", "0 succeeded", "0", corev1.PodStatus{}, "PodEnded", "(no reason given)", "redis-1"},
		{"ended for an odd reason", "0 failed", "0", corev1.PodStatus{Reason: "Out of memory!"}, "PodEnded", "(Out of memory!)", "redis-1"},
		{"vanished", "", "0", corev1.PodStatus{}, "PodDeleted", "Pod redis-0 was deleted without having moved; redis-1 was started", "redis-1"},
		{"vanished with a long life behind it", "", "41", corev1.PodStatus{}, "PodDeleted", "redis-42 was started", "redis-42"},
		{"ended with its clone", "0 failed, 1<0 failed", "1", corev1.PodStatus{Reason: "RestoreFailed"}, "RestoreFailed", "Pod redis-1 has ended", "redis-2"},
		{"ended, and a clone that nobody has seen", "0 failed, 3<0 failed", "0", corev1.PodStatus{Reason: "Evicted"}, "Evicted", "redis-4 was started", "redis-4"},
		{"has ended and is being deleted", "0 failed waits", "0", corev1.PodStatus{}, "PodEnded", "Pod redis-0 has ended", "redis-1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mp := migratingRedis()
			mp.Status.ActivePod = "redis-" + tt.last
			apimeta.SetStatusCondition(&mp.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionColdStarted, Status: metav1.ConditionFalse, Reason: "FirstStart"})
			w := newWorld(t, append(family(t, tt.pods), mp)...)
			if tt.pods != "" {
				w.says("redis-"+tt.last, func(s *corev1.PodStatus) { s.Reason, s.Message = tt.status.Reason, tt.status.Message })
			}
			mp = w.kept()
			if status(mp) != "Creating "+tt.pod+" 0" || w.pod(tt.pod) == nil || is(mp, v1alpha1.ConditionColdStarted) != "True "+tt.reason {
				t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
			}
			said := w.events()
			if c := apimeta.FindStatusCondition(mp.Status.Conditions, v1alpha1.ConditionColdStarted); !strings.Contains(c.Message, tt.says) || !strings.Contains(said, tt.says) || strings.Count(said, "ColdStarted") != 1 {
				t.Errorf("it says %q and %q", c.Message, said)
			}
			// Once it runs, those that have ended go.
			w.runs(tt.pod, "node1")
			if mp = w.kept(); mp.Status.State != v1alpha1.StateRunning || is(mp, v1alpha1.ConditionColdStarted) != "True "+tt.reason {
				t.Errorf("it runs: %+v", mp.Status)
			}
			for _, name := range w.pods() {
				if p := w.pod(name); name != tt.pod && p.DeletionTimestamp == nil {
					t.Errorf("pod %s stays", name)
				}
			}
		})
	}
}

// While a pod ends it may run, so there is no other one.
func TestNoColdStartBeforeTheEnd(t *testing.T) {
	mp := migratingRedis()
	mp.Status.ActivePod = "redis-0"
	w := newWorld(t, append(family(t, "0 deleted"), mp)...)
	if mp = w.kept(); len(w.pods()) != 1 || mp.Status.State != v1alpha1.StateCreating || is(mp, v1alpha1.ConditionReady) != "False NoPod" {
		t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
	}
	w.says("redis-0", func(s *corev1.PodStatus) { s.Phase = corev1.PodSucceeded })
	if mp = w.kept(); status(mp) != "Creating redis-1 0" || mp.Status.Message != "" {
		t.Errorf("status %+v", mp.Status)
	}
}

// Whatever pods there are, the last one to be left is the one.
func TestSeveralPodsRecover(t *testing.T) {
	for _, tt := range []struct{ pods, left, want string }{
		{"0, 1, 2", "redis-0", "Running redis-0 0"},
		{"0, 1, 2", "redis-2", "Running redis-2 0"},
		{"0, 1<0 cloned, 5", "redis-1", "Running redis-1 1"},
		{"0 waits, 4, 5", "redis-0", "MigrationPending redis-0 0"},
	} {
		mp := migratingRedis()
		mp.Status.ActivePod = "redis-0"
		w := newWorld(t, append(family(t, tt.pods), mp)...)
		if mp = w.kept(); mp.Status.State != v1alpha1.StateInvalid || len(w.pods()) != 3 || is(mp, v1alpha1.ConditionReady) != "False NoPod" {
			t.Errorf("%s: pods %v, status %+v", tt.pods, w.pods(), mp.Status)
		}
		for _, name := range w.pods() {
			if name != tt.left {
				p := w.pod(name)
				p.Finalizers = nil
				if err := w.Update(t.Context(), p); err != nil {
					t.Fatal(err)
				}
				if p = w.pod(name); p != nil {
					w.deletes(name)
				}
			}
		}
		if mp = w.kept(); status(mp) != tt.want || mp.Status.Message != "" {
			t.Errorf("%s: with %s left it is %s: %q", tt.pods, tt.left, status(mp), mp.Status.Message)
		}
	}
}

// A stranger has the name of the next pod.
func TestForeignPod(t *testing.T) {
	stranger := sourcePod()
	stranger.Name = "redis-0"
	w := newWorld(t, migratingRedis(), stranger)
	mp, err := w.keep()
	if err == nil || status(mp) != "Invalid  0" || !strings.HasPrefix(mp.Status.Message, `There is a pod "redis-0" that does not belong to this MigratingPod`) {
		t.Errorf("status %+v, %v", mp.Status, err)
	}
	if len(w.pods()) != 1 || w.pod("redis-0").DeletionTimestamp != nil {
		t.Errorf("pods %v", w.pods())
	}
	w.deletes("redis-0")
	if mp = w.kept(); status(mp) != "Creating redis-0 0" || mp.Status.Message != "" || is(mp, v1alpha1.ConditionColdStarted) != "False FirstStart" {
		t.Errorf("status %+v", mp.Status)
	}
}

// A pod of ours that the list did not have yet is none of a stranger.
func TestOwnPodNotYetSeen(t *testing.T) {
	w := newWorld(t, append(family(t, "0 pending"), migratingRedis())...)
	w.mp.Live = interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
		List: func(context.Context, client.WithWatch, client.ObjectList, ...client.ListOption) error { return nil },
	})
	if mp := w.kept(); mp.Status.State == v1alpha1.StateInvalid || len(w.pods()) != 1 {
		t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
	}
	w.mp.Live = w.Client
	if mp := w.kept(); status(mp) != "Creating redis-0 0" {
		t.Errorf("status %+v", mp.Status)
	}
}

func TestAPIServerRefusesThePod(t *testing.T) {
	pods := corev1.Resource("pods")
	for _, tt := range []struct {
		err  error
		want v1alpha1.MigratingPodState
	}{
		{apierrors.NewForbidden(pods, "redis-0", fmt.Errorf("the quota is used up")), v1alpha1.StateInvalid},
		{apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Pod").GroupKind(), "redis-0", nil), v1alpha1.StateInvalid},
		{apierrors.NewBadRequest("no containers"), v1alpha1.StateInvalid},
		// That is nobody's fault.
		{apierrors.NewServiceUnavailable("not now"), ""},
	} {
		w := newWorld(t, migratingRedis())
		w.refuses = tt.err
		mp, err := w.keep()
		if err == nil || mp.Status.State != tt.want || len(w.pods()) != 0 {
			t.Errorf("%v: status %+v, error %v", tt.err, mp.Status, err)
		}
		if tt.want != "" && mp.Status.Message != fmt.Sprintf("The API server refuses the pod: %s.", tt.err) {
			t.Errorf("it says %q", mp.Status.Message)
		}
		w.refuses = nil
		if mp = w.kept(); status(mp) != "Creating redis-0 0" || mp.Status.Message != "" {
			t.Errorf("%v: in the end %+v", tt.err, mp.Status)
		}
	}
}

func TestDeletedMigratingPodMakesNoPods(t *testing.T) {
	w := newWorld(t, migratingRedis(ending))
	if mp := w.kept(); len(w.pods()) != 0 || mp.Status.State != "" {
		t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
	}
	w = newWorld(t)
	if _, err := w.mp.Reconcile(t.Context(), request("redis")); err != nil || len(w.pods()) != 0 {
		t.Errorf("pods %v, %v", w.pods(), err)
	}
}

// All controllers together: a pod is deleted, and so is its clone before it has taken
// over. It moves twice, one after the other.
func TestSecondDeletionWhileItMoves(t *testing.T) {
	w := newWorld(t, migratingRedis())
	// The fake writes its own time on what is deleted.
	w.now = time.Now()
	w.turn()
	w.runs("redis-0", "node0")
	w.turn()
	w.deletes("redis-0")
	mp := w.turn()
	if len(w.ours()) != 1 || status(mp) != "Migrating redis-0 0" || fmt.Sprint(w.pods()) != "[redis-0 redis-1]" {
		t.Fatalf("pods %v, %s, %d migrations", w.pods(), status(mp), len(w.ours()))
	}
	first := w.ours()[0]
	w.clone(&first, "node1", "Unknown", "Receiving")
	w.deletes("redis-1")
	if mp = w.turn(); len(w.ours()) != 1 || status(mp) != "Migrating redis-0 0" || !deferral.HasFinalizer(w.pod("redis-1")) {
		t.Fatalf("after the second deletion %s, %d migrations, clone %v", status(mp), len(w.ours()), w.pod("redis-1").ObjectMeta)
	}
	// It has taken over, and neither kubelet has said more.
	w.clone(&first, "node1", "True", "Cloned")
	if mp = w.turn(); len(w.ours()) != 1 || status(mp) != "Migrating redis-1 1" || !deferral.HasFinalizer(w.pod("redis-1")) {
		t.Fatalf("taken over %s, %d migrations, clone %v", status(mp), len(w.ours()), w.pod("redis-1").ObjectMeta)
	}
	w.says("redis-0", func(s *corev1.PodStatus) { s.Phase, s.Reason = corev1.PodFailed, v1alpha1.ReasonMigrated })
	w.runs("redis-1", "node1")
	mp = w.turn()
	if deferral.HasFinalizer(w.pod("redis-0")) || len(w.ours()) != 2 || status(mp) != "Migrating redis-1 1" {
		t.Fatalf("pods %v, %s, %d migrations", w.pods(), status(mp), len(w.ours()))
	}
	i := slices.IndexFunc(w.ours(), func(m v1alpha1.PodMigration) bool { return m.Spec.PodName == "redis-1" })
	second := w.ours()[i]
	c := w.pod("redis-2")
	if second.Status.ClonePodName != "redis-2" || source(c) != "redis-1" || !deferral.HasFinalizer(c) || !metav1.IsControlledBy(c, mp) || c.Annotations[v1alpha1.AnnotationOrigin] != "redis-0" {
		t.Errorf("clone %s is %v", second.Status.ClonePodName, c)
	}
	w.clone(&second, "node2", "True", "Cloned")
	w.says("redis-1", func(s *corev1.PodStatus) { s.Phase, s.Reason = corev1.PodFailed, v1alpha1.ReasonMigrated })
	w.runs("redis-2", "node2")
	mp = w.turn()
	if status(mp) != "Running redis-2 2" || mp.Status.NodeName != "node2" || is(mp, v1alpha1.ConditionColdStarted) != "False FirstStart" || w.pod("redis-1") != nil {
		t.Errorf("in the end pods %v, %+v", w.pods(), mp.Status)
	}
	for _, m := range w.ours() {
		if m.Status.Phase != v1alpha1.PhaseSucceeded {
			t.Errorf("%s ended %+v", m.Name, m.Status)
		}
	}
}

// All controllers together: the first attempt fails, and the second one does not.
func TestSecondAttempt(t *testing.T) {
	w := newWorld(t, migratingRedis())
	w.now = time.Now()
	w.turn()
	w.runs("redis-0", "node0")
	w.turn()
	w.deletes("redis-0")
	w.turn()
	first := w.ours()[0]
	w.clone(&first, "node1", "Unknown", "Receiving")
	w.turn()
	w.clone(&first, "node1", "False", "StreamFailed")
	mp := w.turn()
	if status(mp) != "MigrationPending redis-0 0" || mp.Status.Message != "The kubelet says StreamFailed." || fmt.Sprint(w.pods()) != "[redis-0]" || len(w.ours()) != 1 {
		t.Fatalf("pods %v, status %+v", w.pods(), mp.Status)
	}
	w.now = w.now.Add(firstBackoff)
	if mp = w.turn(); status(mp) != "Migrating redis-0 0" || len(w.ours()) != 2 || len(w.created) != 2 {
		t.Fatalf("%d migrations, %d clones, status %+v", len(w.ours()), len(w.created), mp.Status)
	}
	second := w.ours()[1]
	w.clone(&second, "node1", "True", "Cloned")
	w.says("redis-0", func(s *corev1.PodStatus) { s.Phase, s.Reason = corev1.PodFailed, v1alpha1.ReasonMigrated })
	w.runs("redis-1", "node1")
	if mp = w.turn(); status(mp) != "Running redis-1 1" || is(mp, v1alpha1.ConditionColdStarted) != "False FirstStart" || deferral.HasFinalizer(w.pod("redis-0")) {
		t.Errorf("pods %v, status %+v", w.pods(), mp.Status)
	}
}
