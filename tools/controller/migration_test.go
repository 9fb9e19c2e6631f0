package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

func TestSucceeds(t *testing.T) {
	source := sourcePod()
	source.Annotations = map[string]string{v1alpha1.AnnotationCancel: "true"}
	move := migration("move")
	move.Spec.NodeSelector = map[string]string{"disk.example.com/kind": "fast"}
	w := newWorld(t, source, move)
	m := w.reconcile("move")
	if m.Status.Phase != v1alpha1.PhaseScheduling || len(w.created) != 1 {
		t.Fatalf("%d clones, %+v", len(w.created), m.Status)
	}
	c := w.created[0]
	if from, _, _ := unstructured.NestedString(c.Object, "spec", "clonePod"); from != "redis" {
		t.Errorf("the clone clones %q", from)
	}
	selector, _, _ := unstructured.NestedStringMap(c.Object, "spec", "nodeSelector")
	if selector["disk.example.com/kind"] != "fast" || c.GetLabels()["app"] != "redis" || c.GetAnnotations()[v1alpha1.AnnotationOrigin] != "redis" {
		t.Errorf("the clone is %v", c.Object)
	}
	if c.GetAnnotations()[v1alpha1.AnnotationCancel] != "" {
		t.Error("the clone is born cancelled")
	}
	for _, reason := range []string{"", "Opening", "Preparing", "Receiving", "Freezing", "Committing", "SourceUnreachable", "Restoring", "MigrationRetrying"} {
		status := "Unknown"
		if reason == "" {
			status = ""
		}
		w.clone(m, "node2", status, reason)
		m = w.reconcile("move")
	}
	w.clone(m, "node2", "True", "Cloned")
	m = w.reconcile("move")
	if got, want := phases(m), "Scheduling Preparing Transferring Freezing Restoring Succeeded"; got != want {
		t.Errorf("phases %s, want %s", got, want)
	}
	if m.Status.SourceNode != "node1" || m.Status.TargetNode != "node2" || len(m.Finalizers) != 0 {
		t.Errorf("in the end %+v, finalizers %v", m.Status, m.Finalizers)
	}
	if got := fmt.Sprint(w.pods()); got != fmt.Sprintf("[redis %s]", m.Status.ClonePodName) {
		t.Errorf("pods %s", got)
	}
}

func TestRefused(t *testing.T) {
	forbidden := apierrors.NewForbidden(corev1.Resource("pods"), "c", fmt.Errorf("nobody may clone this"))
	for _, tt := range []struct {
		name   string
		change func(w *world, p *corev1.Pod, m *v1alpha1.PodMigration)
		reason string
		text   string
	}{
		{"no pod", func(_ *world, _ *corev1.Pod, m *v1alpha1.PodMigration) { m.Spec.PodName = "nobody" }, "UnfitPod", `no pod "nobody"`},
		{"pending", func(_ *world, p *corev1.Pod, _ *v1alpha1.PodMigration) { p.Status.Phase = corev1.PodPending }, "UnfitPod", "is Pending"},
		{"same node", func(_ *world, _ *corev1.Pod, m *v1alpha1.PodMigration) { m.Spec.TargetNode = "node1" }, "UnfitPod", "on node node1 already"},
		{"owned", func(_ *world, p *corev1.Pod, _ *v1alpha1.PodMigration) {
			owner("apps/v1", "StatefulSet", "db")(p)
		}, "UnfitPod", "belongs to StatefulSet db"},
		{"gate off", func(w *world, _ *corev1.Pod, _ *v1alpha1.PodMigration) { w.drops = true }, "MigrationDisabled", "drops spec.clonePod"},
		{"forbidden", func(w *world, _ *corev1.Pod, _ *v1alpha1.PodMigration) { w.refuses = forbidden }, "CloneRefused", "nobody may clone this"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, m := sourcePod(), migration("move")
			hold := &world{}
			tt.change(hold, p, m)
			w := newWorld(t, p, m)
			w.refuses, w.drops = hold.refuses, hold.drops
			m = w.reconcile("move")
			if m.Status.Phase != v1alpha1.PhaseRefused || m.Status.Reason != tt.reason || !strings.Contains(m.Status.Message, tt.text) {
				t.Errorf("it ended %s %s %q", m.Status.Phase, m.Status.Reason, m.Status.Message)
			}
			if len(w.pods()) != 1 || len(m.Finalizers) != 0 {
				t.Errorf("pods %v, finalizers %v", w.pods(), m.Finalizers)
			}
		})
	}
}

// How a clone that does not take over ends its migration.
func TestEnds(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before []string
		reason string
		source corev1.PodPhase
		want   v1alpha1.Phase
	}{
		{"refused", []string{"Opening"}, "SourceRefused", corev1.PodRunning, v1alpha1.PhaseRefused},
		{"refused at the commit", []string{"Opening", "Freezing"}, "SourceRefused", corev1.PodRunning, v1alpha1.PhaseRolledBack},
		{"stream broken", []string{"Opening", "Receiving"}, "StreamFailed", corev1.PodRunning, v1alpha1.PhaseRolledBack},
		{"restore failed", []string{"Restoring"}, "RestoreFailed", corev1.PodRunning, v1alpha1.PhaseRolledBack},
		{"no room on the node", nil, "OutOfcpu", corev1.PodRunning, v1alpha1.PhaseRefused},
		{"source has ended", []string{"Receiving"}, "StreamFailed", corev1.PodFailed, v1alpha1.PhaseFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, sourcePod(), migration("move"))
			m := w.reconcile("move")
			for _, reason := range tt.before {
				w.clone(m, "node2", "Unknown", reason)
				m = w.reconcile("move")
			}
			p := &corev1.Pod{}
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "redis"}, p); err != nil {
				t.Fatal(err)
			}
			p.Status.Phase = tt.source
			if err := w.Status().Update(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			w.clone(m, "node2", "False", tt.reason)
			m = w.reconcile("move")
			if m.Status.Phase != tt.want || m.Status.Reason != tt.reason {
				t.Errorf("it ended %s %s, want %s", m.Status.Phase, m.Status.Reason, tt.want)
			}
			if got := fmt.Sprint(w.pods()); got != "[redis]" {
				t.Errorf("pods %s", got)
			}
		})
	}
}

// A clone on a node is asked to give up and never deleted while it may own the pod; one
// on no node is deleted.
func TestCancel(t *testing.T) {
	for _, tt := range []struct {
		name, node, reason string
		timeout            bool
		// finally is what the kubelet says to it.
		finally string
		want    v1alpha1.Phase
	}{
		{"on no node", "", "", false, "", v1alpha1.PhaseCancelled},
		{"receiving", "node2", "Receiving", false, "False Cancelled", v1alpha1.PhaseCancelled},
		{"too late", "node2", "Restoring", false, "True Cloned", v1alpha1.PhaseSucceeded},
		{"timeout", "node2", "Receiving", true, "False Cancelled", v1alpha1.PhaseRolledBack},
		{"timeout on no node", "", "", true, "", v1alpha1.PhaseRefused},
		{"timeout too late", "node2", "Freezing", true, "True Cloned", v1alpha1.PhaseSucceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, sourcePod(), migration("move"))
			m := w.reconcile("move")
			if tt.node != "" {
				w.clone(m, tt.node, "Unknown", tt.reason)
				m = w.reconcile("move")
			}
			if tt.timeout {
				w.now = w.now.Add(time.Minute)
			} else if err := w.Delete(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			ended := func(m *v1alpha1.PodMigration) {
				t.Helper()
				if !tt.timeout {
					if m != nil {
						t.Errorf("the migration is still there: %+v", m.Status)
					}
					return
				}
				if m.Status.Phase != tt.want {
					t.Errorf("it ended %s, want %s", m.Status.Phase, tt.want)
				}
			}
			clone := m.Status.ClonePodName
			m = w.reconcile("move")
			if tt.node == "" {
				ended(m)
				if len(w.pods()) != 1 {
					t.Errorf("pods %v", w.pods())
				}
				return
			}
			p := &corev1.Pod{}
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: clone}, p); err != nil {
				t.Fatal(err)
			}
			if p.Annotations[v1alpha1.AnnotationCancel] == "" || p.DeletionTimestamp != nil {
				t.Errorf("the clone was not asked: %v", p.ObjectMeta)
			}
			status, reason, _ := strings.Cut(tt.finally, " ")
			w.clone(m, tt.node, status, reason)
			ended(w.reconcile("move"))
			want := 1
			if tt.want == v1alpha1.PhaseSucceeded {
				want = 2
			}
			if len(w.pods()) != want {
				t.Errorf("pods %v", w.pods())
			}
		})
	}
}

// The record of a migration that somebody deleted does not blame somebody else.
func TestCancelSays(t *testing.T) {
	move := migration("move")
	move.Finalizers = []string{"example.com/reads"}
	w := newWorld(t, sourcePod(), move)
	m := w.reconcile("move")
	if err := w.Delete(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if m = w.reconcile("move"); m.Status.Phase != v1alpha1.PhaseCancelled || m.Status.Reason != v1alpha1.ReasonCancelled || len(m.Finalizers) != 1 {
		t.Errorf("it ended %+v, finalizers %v", m.Status, m.Finalizers)
	}
}

// Nobody has to tell the reconciler that a clone has changed.
func TestLooksAgain(t *testing.T) {
	w := newWorld(t, sourcePod(), migration("move"))
	m := w.reconcile("move")
	for _, status := range []string{"", "Unknown", "True"} {
		w.clone(m, "node2", status, "Reason")
		m = w.reconcile("move")
		result, err := w.r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(m)})
		if again := result.RequeueAfter > 0 && result.RequeueAfter <= lookAgain; err != nil || again == m.Status.Phase.Over() {
			t.Errorf("%s: %+v, %v", m.Status.Phase, result, err)
		}
	}
}

// A reconciler that stopped at any write goes on without making a second clone.
func TestRestarts(t *testing.T) {
	w := newWorld(t, sourcePod(), migration("move"))
	stop := fmt.Errorf("stopped")
	for i := range 20 {
		n := 0
		broken := interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				if n++; n > i {
					return stop
				}
				return c.Create(ctx, o, opts...)
			},
			SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
				if n++; n > i {
					return stop
				}
				return c.SubResource(sub).Patch(ctx, o, p, opts...)
			},
		})
		w.r.Client = broken
		_, _ = w.r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Namespace: ns, Name: "move"}})
	}
	w.r.Client = w.Client
	m := w.reconcile("move")
	if len(w.created) != 1 || len(w.pods()) != 2 {
		t.Fatalf("%d clones were made, pods %v", len(w.created), w.pods())
	}
	w.clone(m, "node2", "True", "Cloned")
	if m = w.reconcile("move"); m.Status.Phase != v1alpha1.PhaseSucceeded {
		t.Errorf("it ended %+v", m.Status)
	}
}

// The clone of an owned pod belongs to the owner from the start, and its deletion waits
// as that of its source.
func TestCloneOfOwned(t *testing.T) {
	for _, tt := range []struct {
		name      string
		change    func(*corev1.Pod)
		finalizer bool
		// clone is its name, or the beginning of it.
		clone string
	}{
		{"of a ReplicaSet", func(p *corev1.Pod) { ofSet(p); p.Finalizers = []string{other, v1alpha1.FinalizerMigrate} }, true, "redis-"},
		{"of a ReplicaSet, without our finalizer", func(p *corev1.Pod) { ofSet(p); p.Finalizers = []string{other} }, false, "redis-"},
		{"of a MigratingPod", func(p *corev1.Pod) { ofRedis(p); p.Finalizers = []string{v1alpha1.FinalizerMigrate} }, true, "redis-0"},
		{"bare", func(p *corev1.Pod) { p.Finalizers = []string{v1alpha1.FinalizerMigrate} }, true, "redis-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := changed(sourcePod(), tt.change, deadline("45"))
			w := newWorld(t, p.DeepCopy(), migration("move"))
			m := w.reconcile("move")
			c := w.pod(m.Status.ClonePodName)
			if !strings.HasPrefix(c.Name, tt.clone) || !equality.Semantic.DeepEqual(c.OwnerReferences, p.OwnerReferences) {
				t.Errorf("clone %s of %v", c.Name, c.OwnerReferences)
			}
			if c.Labels["app"] != "redis" || c.Annotations[v1alpha1.AnnotationSource] != "redis" || c.Annotations[v1alpha1.AnnotationDeadline] != "45" {
				t.Errorf("labels %v, annotations %v", c.Labels, c.Annotations)
			}
			if deferral.HasFinalizer(c) != tt.finalizer || slices.Contains(c.Finalizers, other) {
				t.Errorf("finalizers %v", c.Finalizers)
			}
		})
	}
}

// The clone of a MigratingPod's pod has the number after the highest in use.
func TestCloneOfMigratingPodIsNumbered(t *testing.T) {
	for _, tt := range []struct{ source, others, want string }{
		{"redis-0", "", "redis-1"},
		{"redis-9", "", "redis-10"},
		{"redis-3", "redis-2 redis-5", "redis-6"},
		{"redis-3", "redis-07 redis-7-1 other-8", "redis-4"},
		// That of a stranger.
		{"redis-3", "redis-4!", "redis-5"},
	} {
		source, move := changed(sourcePod(), ofRedis), migration("move")
		source.Name, move.Spec.PodName = tt.source, tt.source
		objects := []client.Object{source, move}
		for name := range strings.FieldsSeq(tt.others) {
			p := sourcePod()
			if p.Name = strings.TrimSuffix(name, "!"); p.Name == name {
				ofRedis(p)
			}
			objects = append(objects, p)
		}
		w := newWorld(t, objects...)
		if m := w.reconcile("move"); m.Status.ClonePodName != tt.want || len(w.created) != 1 {
			t.Errorf("%s beside %q gets clone %s, want %s", tt.source, tt.others, m.Status.ClonePodName, tt.want)
		}
	}
}

// A pod whose deletion waits can be moved, one that ends cannot.
func TestMovesWhileDeleted(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*corev1.Pod)
		want   bool
	}{
		{"waits", func(*corev1.Pod) {}, true},
		{"past its deadline", deadline("100"), false},
		{"forced", forced, false},
		{"without our finalizer", func(p *corev1.Pod) { p.Finalizers = []string{other} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, waiting(tt.change), migration("move"))
			m := w.reconcile("move")
			if tt.want != (m.Status.Phase == v1alpha1.PhaseScheduling) || tt.want != (len(w.created) == 1) {
				t.Errorf("%d clones, %+v", len(w.created), m.Status)
			}
			if !tt.want && m.Status.Message != `Pod "redis" is being deleted.` {
				t.Errorf("it says %q", m.Status.Message)
			}
		})
	}
}

// A source that was given away stands in the way of a controller, and of nobody else.
func TestSourceIsRemoved(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*corev1.Pod)
		gone   bool
	}{
		{"bare", func(*corev1.Pod) {}, false},
		{"of a ReplicaSet", ofSet, true},
		{"of a MigratingPod", ofRedis, true},
		{"owned without being controlled", func(p *corev1.Pod) { ofSet(p); p.OwnerReferences[0].Controller = nil }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			move, ttl := migration("move"), int32(0)
			move.Spec.TTLSecondsAfterFinished = &ttl
			w := newWorld(t, changed(sourcePod(), tt.change), move)
			w.clone(w.reconcile("move"), "node2", "True", "Cloned")
			// Until its kubelet is done with it, it stays, and so does a migration that has to remove it.
			if m := w.reconcile("move"); w.pod("redis") == nil || (m != nil) != tt.gone {
				t.Errorf("pods %v, migration %v", w.pods(), m)
			}
			w.says("redis", func(s *corev1.PodStatus) { s.Phase, s.Reason = corev1.PodFailed, v1alpha1.ReasonMigrated })
			if tt.gone {
				if m := w.reconcile("move"); m != nil {
					t.Errorf("the migration stays: %+v", m.Status)
				}
			}
			if gone := w.pod("redis") == nil; gone != tt.gone || len(w.pods()) == 0 {
				t.Errorf("pods %v", w.pods())
			}
		})
	}
}

// A later pod with the name of the source is not the source.
func TestSourceIsRemovedByUID(t *testing.T) {
	w := newWorld(t, changed(sourcePod(), ofSet), migration("move"))
	w.clone(w.reconcile("move"), "node2", "True", "Cloned")
	w.deletes("redis")
	later := changed(sourcePod(), ofSet, phase(corev1.PodFailed))
	if err := w.Create(t.Context(), later); err != nil {
		t.Fatal(err)
	}
	if w.reconcile("move"); w.pod("redis") == nil {
		t.Error("a later pod is gone")
	}
}

func TestTTL(t *testing.T) {
	seconds := func(n int32) *int32 { return &n }
	for _, tt := range []struct {
		name string
		ttl  *int32
		// after is how long it is kept, 0 for ever.
		after time.Duration
	}{
		{"none", nil, 0},
		{"a minute", seconds(60), time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			move := migration("move")
			move.Spec.TTLSecondsAfterFinished, move.Spec.TimeoutSeconds = tt.ttl, 3600
			w := newWorld(t, sourcePod(), move)
			m := w.reconcile("move")
			// It counts from the end.
			w.now = w.now.Add(10 * time.Minute)
			if m = w.reconcile("move"); m == nil {
				t.Fatal("it was deleted while it ran")
			}
			w.clone(m, "node2", "False", "SourceRefused")
			if m = w.reconcile("move"); m == nil || m.Status.Phase != v1alpha1.PhaseRefused {
				t.Fatalf("it ended %+v", m)
			}
			if result, err := w.r.Reconcile(t.Context(), request("move")); err != nil || result.RequeueAfter != tt.after {
				t.Errorf("it looks again after %s, %v", result.RequeueAfter, err)
			}
			w.now = w.now.Add(time.Minute)
			if m = w.reconcile("move"); (m == nil) != (tt.ttl != nil) {
				t.Errorf("after a minute there is %v", m)
			}
		})
	}
}

// A pod that could not be moved is evicted only if the migration says so.
func TestEvict(t *testing.T) {
	for _, tt := range []struct {
		name    string
		change  func(m *v1alpha1.PodMigration)
		evicted bool
	}{
		{"rolled back", func(*v1alpha1.PodMigration) {}, true},
		{"refused", func(m *v1alpha1.PodMigration) { m.Status.Phase = v1alpha1.PhaseRefused }, true},
		{"runs on", func(m *v1alpha1.PodMigration) { m.Spec.OnFailure = v1alpha1.FailureRunOn }, false},
		{"cancelled", func(m *v1alpha1.PodMigration) { m.Status.Phase = v1alpha1.PhaseCancelled }, false},
		{"dry run", func(m *v1alpha1.PodMigration) { m.Spec.DryRun = true }, false},
		{"another pod", func(m *v1alpha1.PodMigration) { m.Status.SourcePodUID = "another" }, false},
		{"refused before the pod was known", func(m *v1alpha1.PodMigration) { m.Status.Phase, m.Status.SourcePodUID = v1alpha1.PhaseRefused, "" }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := migration("move")
			m.Spec.OnFailure = v1alpha1.FailureEvict
			m.Status.Phase, m.Status.SourcePodUID = v1alpha1.PhaseRolledBack, "uid-of-redis"
			tt.change(m)
			w := newWorld(t, sourcePod(), m)
			w.reconcile("move")
			if got := len(w.pods()) == 0; got != tt.evicted {
				t.Errorf("evicted %v", got)
			}
		})
	}
}

// As long as a disruption budget forbids the eviction it is tried again.
func TestEvictIsHeld(t *testing.T) {
	m := migration("move")
	m.Spec.OnFailure = v1alpha1.FailureEvict
	m.Status.Phase, m.Status.SourcePodUID = v1alpha1.PhaseRolledBack, "uid-of-redis"
	w := newWorld(t, sourcePod(), m)
	held := true
	w.r.Client = interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
		SubResourceCreate: func(ctx context.Context, c client.Client, sub string, o, s client.Object, opts ...client.SubResourceCreateOption) error {
			if held {
				return apierrors.NewTooManyRequests("the budget", 0)
			}
			return c.SubResource(sub).Create(ctx, o, s, opts...)
		},
	})
	request := ctrl.Request{NamespacedName: client.ObjectKey{Namespace: ns, Name: "move"}}
	for range 2 {
		if r, err := w.r.Reconcile(t.Context(), request); err != nil || r.RequeueAfter != evictInterval || len(w.pods()) != 1 {
			t.Errorf("%+v, %v, %d pods", r, err, len(w.pods()))
		}
	}
	held = false
	if r, err := w.r.Reconcile(t.Context(), request); err != nil || r.RequeueAfter != 0 || len(w.pods()) != 0 {
		t.Errorf("%+v, %v, %d pods", r, err, len(w.pods()))
	}
}

// A clone that is deleted while its source may have been given away: what became of the
// source is known only when its kubelet has said so.
func TestCloneGone(t *testing.T) {
	for _, tt := range []struct {
		name, seen string
		// source is its phase and reason in the end.
		source, reason string
		waits          bool
		want           v1alpha1.Phase
	}{
		{"before the freeze", "Receiving", "Running", "", false, v1alpha1.PhaseCancelled},
		{"frozen, and thawed", "Freezing", "Running", "", true, v1alpha1.PhaseCancelled},
		{"given away", "Restoring", "Failed", "Migrated", true, v1alpha1.PhaseSucceeded},
		{"both gone", "Restoring", "Failed", "", true, v1alpha1.PhaseFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, sourcePod(), migration("move"))
			m := w.reconcile("move")
			w.clone(m, "node2", "Unknown", tt.seen)
			m = w.reconcile("move")
			if err := w.Delete(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: m.Status.ClonePodName}}); err != nil {
				t.Fatal(err)
			}
			if m = w.reconcile("move"); m.Status.Phase.Over() == tt.waits {
				t.Errorf("at once it is %s", m.Status.Phase)
			}
			p := &corev1.Pod{}
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "redis"}, p); err != nil {
				t.Fatal(err)
			}
			p.Status.Phase, p.Status.Reason = corev1.PodPhase(tt.source), tt.reason
			if err := w.Status().Update(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			w.now = w.now.Add(goneGrace)
			if m = w.reconcile("move"); m.Status.Phase != tt.want {
				t.Errorf("it ended %s, want %s", m.Status.Phase, tt.want)
			}
		})
	}
}

// What a kubelet measures is taken over; what is not understood is left out.
func TestMeasure(t *testing.T) {
	m := migration("move")
	measure(m, nil)
	measure(m, &corev1.PodCondition{Message: "bytes=1048576 expectedFreezeMilliseconds=70 color=blue frozenMilliseconds=x"})
	if s := m.Status; s.TransferredBytes != 1<<20 || s.ExpectedFreezeMilliseconds == nil || *s.ExpectedFreezeMilliseconds != 70 || s.FrozenMilliseconds != nil {
		t.Errorf("%+v", s)
	}
	measure(m, &corev1.PodCondition{Message: "bytes=2097152 frozenMilliseconds=139"})
	if s := m.Status; s.TransferredBytes != 2<<20 || s.FrozenMilliseconds == nil || *s.FrozenMilliseconds != 139 {
		t.Errorf("%+v", s)
	}
}
