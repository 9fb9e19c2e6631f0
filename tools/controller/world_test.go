package controller

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// world is an API server with the controllers' objects, without kubelets: the test writes
// what they would.
type world struct {
	*testing.T
	client.Client
	r   *Migrations
	d   *Deletions
	mp  *MigratingPods
	now time.Time
	// said has the events.
	said *events.FakeRecorder
	// created has the clones as they were sent: the typed client of the test does not
	// know spec.clonePod.
	created []*unstructured.Unstructured
	// refuses is what the API server says to a new pod.
	refuses error
	// drops is an API server whose feature gate is off.
	drops bool
}

const ns = "default"

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{T: t, now: time.Unix(1000, 0), said: events.NewFakeRecorder(100)}
	uids := 0
	w.Client = fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithStatusSubresource(&v1alpha1.PodMigration{}, &v1alpha1.MigratingPod{}, &corev1.Pod{}).
		WithInterceptorFuncs(interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			u, clone := o.(*unstructured.Unstructured)
			if _, pod := o.(*corev1.Pod); (pod || clone) && w.refuses != nil {
				return w.refuses
			}
			if clone && w.drops {
				unstructured.RemoveNestedField(u.Object, "spec", "clonePod")
			}
			var options client.CreateOptions
			if options.ApplyOptions(opts); len(options.DryRun) > 0 {
				return nil
			}
			if clone {
				w.created = append(w.created, u.DeepCopy())
			}
			uids++
			o.SetUID(types.UID(fmt.Sprintf("uid-%d", uids)))
			o.SetCreationTimestamp(metav1.NewTime(w.now))
			return c.Create(ctx, o, opts...)
		}, Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			// The fake does not look at the UID.
			asked := (&client.DeleteOptions{}).ApplyOptions(opts).AsDeleteOptions()
			there := o.DeepCopyObject().(client.Object)
			if asked.Preconditions != nil && asked.Preconditions.UID != nil {
				if err := c.Get(ctx, client.ObjectKeyFromObject(o), there); err == nil && there.GetUID() != *asked.Preconditions.UID {
					return apierrors.NewConflict(corev1.Resource("pods"), o.GetName(), fmt.Errorf("another UID"))
				}
			}
			return c.Delete(ctx, o, opts...)
		}}).Build()
	now := func() time.Time { return w.now }
	w.r = &Migrations{Client: w.Client, Live: w.Client, Recorder: w.said, Now: now}
	w.d = &Deletions{Client: w.Client, Live: w.Client, Recorder: w.said, Now: now}
	w.mp = &MigratingPods{Client: w.Client, Live: w.Client, Recorder: w.said, Now: now}
	return w
}

// request names an object.
func request(name string) ctrl.Request {
	return ctrl.Request{NamespacedName: client.ObjectKey{Namespace: ns, Name: name}}
}

// events are those since it was asked last.
func (w *world) events() string {
	var all []string
	for {
		select {
		case e := <-w.said.Events:
			all = append(all, e)
		default:
			return strings.Join(all, "\n")
		}
	}
}

// pod reads a pod, nil if there is none.
func (w *world) pod(name string) *corev1.Pod {
	w.Helper()
	p := &corev1.Pod{}
	if err := w.Get(w.Context(), request(name).NamespacedName, p); apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		w.Fatal(err)
	}
	return p
}

// says changes the status of a pod as its kubelet would.
func (w *world) says(name string, change func(*corev1.PodStatus)) {
	w.Helper()
	p := w.pod(name)
	change(&p.Status)
	if err := w.Status().Update(w.Context(), p); err != nil {
		w.Fatal(err)
	}
}

// deletes deletes a pod, as somebody would.
func (w *world) deletes(name string) {
	w.Helper()
	if err := w.Delete(w.Context(), w.pod(name)); err != nil {
		w.Fatal(err)
	}
}

// runs brings a pod up on a node.
func (w *world) runs(name, node string) {
	w.Helper()
	p := w.pod(name)
	p.Spec.NodeName = node
	if err := w.Update(w.Context(), p); err != nil {
		w.Fatal(err)
	}
	w.says(name, func(s *corev1.PodStatus) {
		s.Phase = corev1.PodRunning
		s.Conditions = append(s.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
	})
}

// owner gives a pod a controller, whose UID is uid-of- and its name.
func owner(apiVersion, kind, name string) func(*corev1.Pod) {
	yes := true
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: name, UID: types.UID("uid-of-" + name), Controller: &yes}}
	}
}

// changed is a pod after some changes.
func changed(p *corev1.Pod, changes ...func(*corev1.Pod)) *corev1.Pod {
	for _, change := range changes {
		change(p)
	}
	return p
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
