package controller

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// world is an API server with one pod and one migration, without kubelets: the test
// writes what they would.
type world struct {
	*testing.T
	client.Client
	r   *Migrations
	now time.Time
	// created has the clones as they were sent: the typed client of the test does not
	// know spec.clonePod.
	created []*unstructured.Unstructured
	// refuses is what the API server says to a clone.
	refuses error
	// drops is an API server whose feature gate is off.
	drops bool
}

const ns = "default"

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{T: t, now: time.Unix(1000, 0)}
	w.Client = fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithStatusSubresource(&v1alpha1.PodMigration{}, &corev1.Pod{}).
		WithInterceptorFuncs(interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if u, ok := o.(*unstructured.Unstructured); ok {
				if w.refuses != nil {
					return w.refuses
				}
				if w.drops {
					unstructured.RemoveNestedField(u.Object, "spec", "clonePod")
				}
				var options client.CreateOptions
				if options.ApplyOptions(opts); len(options.DryRun) > 0 {
					return nil
				}
				w.created = append(w.created, u.DeepCopy())
				u.SetUID("uid-of-clone")
			}
			return c.Create(ctx, o, opts...)
		}}).Build()
	w.r = &Migrations{Client: w.Client, Live: w.Client, Recorder: events.NewFakeRecorder(100), Now: func() time.Time { return w.now }}
	return w
}

func sourcePod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "redis", UID: "uid-of-redis", Labels: map[string]string{"app": "redis"}},
		Spec:       corev1.PodSpec{NodeName: "node1", Containers: []corev1.Container{{Name: "redis", Image: "redis:1"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

func migration(name string) *v1alpha1.PodMigration {
	return &v1alpha1.PodMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: "uid-of-move"},
		Spec:       v1alpha1.PodMigrationSpec{PodName: "redis", TimeoutSeconds: 60},
	}
}

// reconcile calls the reconciler until a call changes nothing, and returns the result.
func (w *world) reconcile(name string) *v1alpha1.PodMigration {
	w.Helper()
	m := &v1alpha1.PodMigration{}
	for range 10 {
		before := m.ResourceVersion
		if _, err := w.r.Reconcile(w.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Namespace: ns, Name: name}}); err != nil {
			w.Fatal(err)
		}
		m = &v1alpha1.PodMigration{}
		if err := w.Get(w.Context(), client.ObjectKey{Namespace: ns, Name: name}, m); apierrors.IsNotFound(err) {
			return nil
		} else if err != nil {
			w.Fatal(err)
		}
		if m.ResourceVersion == before {
			return m
		}
	}
	w.Fatal("the reconciler does not come to rest")
	return nil
}

// clone changes the clone as its kubelet would.
func (w *world) clone(m *v1alpha1.PodMigration, node, status, reason string) {
	w.Helper()
	p := &corev1.Pod{}
	if err := w.Get(w.Context(), client.ObjectKey{Namespace: ns, Name: m.Status.ClonePodName}, p); err != nil {
		w.Fatal(err)
	}
	if p.Spec.NodeName != node {
		p.Spec.NodeName = node
		if err := w.Update(w.Context(), p); err != nil {
			w.Fatal(err)
		}
	}
	if status == "" {
		return
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: v1alpha1.ConditionCloned, Status: corev1.ConditionStatus(status), Reason: reason, Message: "The kubelet says " + reason + "."}}
	p.Status.Phase = corev1.PodPending
	if status == "False" {
		p.Status.Phase = corev1.PodFailed
	}
	if err := w.Status().Update(w.Context(), p); err != nil {
		w.Fatal(err)
	}
}

func (w *world) pods() (names []string) {
	w.Helper()
	var all corev1.PodList
	if err := w.List(w.Context(), &all); err != nil {
		w.Fatal(err)
	}
	for _, p := range all.Items {
		names = append(names, p.Name)
	}
	return names
}

func phases(m *v1alpha1.PodMigration) string {
	var all []string
	for _, t := range m.Status.PhaseTransitions {
		all = append(all, string(t.Phase))
	}
	return strings.Join(all, " ")
}

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
			yes := true
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "db", UID: "1", Controller: &yes}}
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
