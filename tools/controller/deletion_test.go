package controller

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// other is a finalizer that somebody else has put on a pod.
const other = "example.com/other"

// waiting is the source pod, whose deletion was asked for 100 seconds before the world
// began: it waits for 500 seconds more.
func waiting(changes ...func(*corev1.Pod)) *corev1.Pod {
	p, grace := sourcePod(), int64(30)
	p.Finalizers = []string{other, v1alpha1.FinalizerMigrate}
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &metav1.Time{Time: time.Unix(1000-100+30, 0)}, &grace
	return changed(p, changes...)
}

func forced(p *corev1.Pod) {
	none := int64(0)
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &metav1.Time{Time: time.Unix(900, 0)}, &none
}

func deadline(seconds string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { metav1.SetMetaDataAnnotation(&p.ObjectMeta, v1alpha1.AnnotationDeadline, seconds) }
}

func phase(phase corev1.PodPhase) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Status.Phase = phase }
}

// cloneOf makes a pod a clone with a condition Cloned, without one if the status is empty.
func cloneOf(source, cloned string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		metav1.SetMetaDataAnnotation(&p.ObjectMeta, v1alpha1.AnnotationSource, source)
		if cloned != "" {
			p.Status.Conditions = []corev1.PodCondition{{Type: v1alpha1.ConditionCloned, Status: corev1.ConditionStatus(cloned)}}
		}
	}
}

// node is one whose condition Ready has a status.
func node(ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeDiskPressure, Status: corev1.ConditionUnknown}, {Type: corev1.NodeReady, Status: ready},
	}}}
}

func replicaSet(changes ...func(*metav1.ObjectMeta)) *appsv1.ReplicaSet {
	rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "web", UID: "uid-of-web"}}
	for _, change := range changes {
		change(&rs.ObjectMeta)
	}
	return rs
}

func another(o *metav1.ObjectMeta) { o.UID = "uid-of-a-later-one" }

func ending(o *metav1.ObjectMeta) {
	o.DeletionTimestamp, o.Finalizers = &metav1.Time{Time: time.Unix(990, 0)}, []string{"foregroundDeletion"}
}

func migratingRedis(changes ...func(*metav1.ObjectMeta)) *v1alpha1.MigratingPod {
	seconds := int32(120)
	mp := &v1alpha1.MigratingPod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "redis", UID: "uid-of-redis-mp", Generation: 1},
		Spec: v1alpha1.MigratingPodSpec{
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "redis"}, Annotations: map[string]string{"example.com/note": "kept"}, Finalizers: []string{other}},
				Spec:       corev1.PodSpec{NodeSelector: map[string]string{"zone": "a"}, Containers: []corev1.Container{{Name: "redis", Image: "redis:1"}}},
			},
			NodeSelector: map[string]string{"disk": "fast"},
			Strategy:     v1alpha1.MigratingPodStrategy{DeadlineSeconds: &seconds, Priority: 7},
		},
	}
	for _, change := range changes {
		change(&mp.ObjectMeta)
	}
	return mp
}

// ofSet and ofRedis say who controls a pod.
var ofSet = owner("apps/v1", "ReplicaSet", "web")

func ofRedis(p *corev1.Pod) {
	owner("podmig.dev/v1alpha1", "MigratingPod", "redis")(p)
	p.OwnerReferences[0].UID = "uid-of-redis-mp"
}

// theirs is a migration of the pod that somebody has ordered by hand.
func theirs(phase v1alpha1.Phase, source types.UID) *v1alpha1.PodMigration {
	m := migration("theirs")
	m.Status.Phase, m.Status.SourcePodUID = phase, source
	return m
}

// ours are the migrations that were made for deletions, in the order of their names.
func (w *world) ours() []v1alpha1.PodMigration {
	w.Helper()
	var all v1alpha1.PodMigrationList
	if err := w.List(w.Context(), &all, client.HasLabels{v1alpha1.LabelSourceUID}); err != nil {
		w.Fatal(err)
	}
	return all.Items
}

// look reconciles the source pod once, and tells when the next time is.
func (w *world) look() time.Duration {
	w.Helper()
	result, err := w.d.Reconcile(w.Context(), request("redis"))
	if err != nil {
		w.Fatal(err)
	}
	return result.RequeueAfter
}

// What is done with a pod that is seen for the first time.
func TestDeletion(t *testing.T) {
	objects := func(all ...client.Object) []client.Object { return all }
	healthy := objects(replicaSet(), node(corev1.ConditionTrue))
	for _, tt := range []struct {
		name    string
		pod     *corev1.Pod
		objects []client.Object
		// want is moves, waits, released or nothing.
		want string
		// says is part of an event.
		says string
	}{
		{"bare", waiting(), nil, "moves", "MigratingOnDeletion"},
		{"of a ReplicaSet", waiting(ofSet), healthy, "moves", "MigratingOnDeletion"},
		{"of a MigratingPod", waiting(ofRedis), objects(migratingRedis()), "moves", "MigratingOnDeletion"},
		{"of a ReplicationController", waiting(owner("v1", "ReplicationController", "web")),
			objects(&corev1.ReplicationController{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "web", UID: "uid-of-web"}}, node(corev1.ConditionTrue)), "moves", ""},
		{"a deadline of its own", waiting(deadline("110")), nil, "moves", ""},

		{"not deleted", waiting(func(p *corev1.Pod) { p.DeletionTimestamp, p.DeletionGracePeriodSeconds = nil, nil }), nil, "nothing", ""},
		{"without our finalizer", waiting(func(p *corev1.Pod) { p.Finalizers = []string{other} }), nil, "nothing", ""},

		{"has failed", waiting(phase(corev1.PodFailed)), nil, "released", ""},
		{"has succeeded", waiting(phase(corev1.PodSucceeded)), nil, "released", ""},
		{"forced", waiting(forced), nil, "released", ""},
		{"past the deadline", waiting(deadline("100")), nil, "released", ""},
		{"no deadline", waiting(deadline("0")), nil, "released", ""},
		{"does not run yet", waiting(phase(corev1.PodPending)), nil, "released", "MigrationGivenUp The pod does not run yet"},

		{"ReplicaSet gone", waiting(ofSet), objects(node(corev1.ConditionTrue)), "released", "MigrationGivenUp ReplicaSet web is deleted"},
		{"another ReplicaSet", waiting(ofSet), objects(replicaSet(another), node(corev1.ConditionTrue)), "released", "ReplicaSet web is deleted"},
		{"ReplicaSet being deleted", waiting(ofSet), objects(replicaSet(ending), node(corev1.ConditionTrue)), "released", "ReplicaSet web is deleted"},
		{"MigratingPod gone", waiting(ofRedis), nil, "released", "MigratingPod redis is deleted"},
		{"another MigratingPod", waiting(ofRedis), objects(migratingRedis(another)), "released", "MigratingPod redis is deleted"},
		{"MigratingPod being deleted", waiting(ofRedis), objects(migratingRedis(ending)), "released", "MigratingPod redis is deleted"},
		{"of a StatefulSet", waiting(owner("apps/v1", "StatefulSet", "db")), nil, "released", "CannotMigrate Pod \"redis\" belongs to StatefulSet db"},
		{"of a Job", waiting(owner("batch/v1", "Job", "sum")), nil, "released", "CannotMigrate Pod \"redis\" belongs to Job sum"},
		{"of a DaemonSet", waiting(owner("apps/v1", "DaemonSet", "log")), nil, "released", "CannotMigrate Pod \"redis\" belongs to DaemonSet log"},

		// A set replaces the pods of lost nodes; for others nobody does.
		{"node lost, of a ReplicaSet", waiting(ofSet), objects(replicaSet(), node(corev1.ConditionUnknown)), "released", "Node node1 does not answer"},
		{"node gone, of a ReplicaSet", waiting(ofSet), objects(replicaSet()), "released", "ReplicaSet web replaces it"},
		{"node not ready, of a ReplicaSet", waiting(ofSet), objects(replicaSet(), node(corev1.ConditionFalse)), "moves", ""},
		{"node lost, of a MigratingPod", waiting(ofRedis), objects(migratingRedis(), node(corev1.ConditionUnknown)), "moves", ""},
		{"node gone, of a MigratingPod", waiting(ofRedis), objects(migratingRedis()), "moves", ""},
		{"node lost, bare", waiting(), objects(node(corev1.ConditionUnknown)), "moves", ""},

		{"moves already", waiting(), objects(theirs(v1alpha1.PhaseFreezing, "uid-of-redis")), "waits", ""},
		{"is to move already", waiting(), objects(theirs("", "")), "waits", ""},
		{"has moved", waiting(), objects(theirs(v1alpha1.PhaseSucceeded, "uid-of-redis")), "waits", ""},
		{"somebody could not move it", waiting(), objects(theirs(v1alpha1.PhaseRolledBack, "uid-of-redis")), "moves", ""},
		{"an earlier one has moved", waiting(), objects(theirs(v1alpha1.PhaseSucceeded, "uid-of-an-earlier-one")), "moves", ""},
		{"a clone", waiting(cloneOf("x", ""), phase(corev1.PodPending)), nil, "waits", ""},
		{"a clone on no node", waiting(cloneOf("x", ""), phase(corev1.PodPending), forced), nil, "released", ""},
		{"a clone that takes over", waiting(cloneOf("x", "Unknown"), phase(corev1.PodPending)), nil, "waits", ""},
		{"a clone that has just taken over", waiting(cloneOf("x", "True"), phase(corev1.PodPending)), nil, "waits", ""},
		{"a clone that runs", waiting(cloneOf("x", "True")), nil, "moves", ""},
		{"a clone that has failed", waiting(cloneOf("x", "False"), phase(corev1.PodFailed)), nil, "released", ""},
		{"a clone whose owner is gone", waiting(cloneOf("x", "Unknown"), phase(corev1.PodPending), ofRedis), nil, "released", "MigratingPod redis is deleted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, append(slices.Clone(tt.objects), tt.pod.DeepCopy())...)
			again := w.look()
			after := w.pod("redis")
			got := "nothing"
			switch {
			case deferral.HasFinalizer(tt.pod) && !deferral.HasFinalizer(after):
				got = "released"
			case len(w.ours()) > 0:
				got = "moves"
			case again > 0:
				got = "waits"
			}
			if got != tt.want || !slices.Contains(after.Finalizers, other) {
				t.Errorf("%s, finalizers %v, want %s", got, after.Finalizers, tt.want)
			}
			if said := w.events(); !strings.Contains(said, tt.says) || tt.says == "" && got != "moves" && said != "" {
				t.Errorf("it says %q", said)
			}
			// It looks again at the deadline at the latest; without a reason to wait, not at all.
			var end time.Duration
			if got == "moves" || got == "waits" {
				end = min(deferral.Deadline(tt.pod).Sub(w.now), lookAgain)
			}
			if again != end {
				t.Errorf("it looks again after %s, want %s", again, end)
			}
			before := len(w.ours())
			if w.look(); len(w.ours()) != before || w.events() != "" {
				t.Errorf("the second time there are %d migrations instead of %d", len(w.ours()), before)
			}
		})
	}
}

func TestDeletionOfNoPod(t *testing.T) {
	w := newWorld(t)
	if again := w.look(); again != 0 || len(w.ours()) != 0 {
		t.Errorf("it looks again after %s", again)
	}
}

// What is asked of a migration.
func TestDeletionOrders(t *testing.T) {
	for _, tt := range []struct {
		name    string
		pod     *corev1.Pod
		objects []client.Object
		timeout int32
		// mine: it has the selector and the priority of the MigratingPod, and belongs to it.
		mine bool
	}{
		{"bare", waiting(), nil, 500, false},
		{"a long deadline", waiting(deadline("1000000")), nil, 86300, false},
		{"of a ReplicaSet", waiting(ofSet), []client.Object{replicaSet(), node(corev1.ConditionTrue)}, 500, false},
		{"of a MigratingPod", waiting(ofRedis, deadline("120")), []client.Object{migratingRedis()}, 20, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, append(tt.objects, tt.pod)...)
			w.look()
			if len(w.ours()) != 1 {
				t.Fatalf("%d migrations", len(w.ours()))
			}
			m := w.ours()[0]
			if m.Namespace != ns || m.Spec.PodName != "redis" || m.Labels[v1alpha1.LabelSourceUID] != "uid-of-redis" {
				t.Errorf("it moves %s/%s, labels %v", m.Namespace, m.Spec.PodName, m.Labels)
			}
			if ttl := m.Spec.TTLSecondsAfterFinished; m.Spec.TimeoutSeconds != tt.timeout || ttl == nil || *ttl != historySeconds {
				t.Errorf("timeout %d, want %d; kept %v", m.Spec.TimeoutSeconds, tt.timeout, ttl)
			}
			if mine := m.Spec.NodeSelector["disk"] == "fast" && m.Spec.Priority == 7 && len(m.OwnerReferences) == 1; mine != tt.mine {
				t.Errorf("selector %v, priority %d, owners %v", m.Spec.NodeSelector, m.Spec.Priority, m.OwnerReferences)
			}
			if tt.mine && (m.OwnerReferences[0].UID != "uid-of-redis-mp" || m.OwnerReferences[0].Kind != "MigratingPod") {
				t.Errorf("it belongs to %v", m.OwnerReferences)
			}
		})
	}
}

// Each failure doubles the pause, and the sixth is the last.
func TestDeletionRetries(t *testing.T) {
	w := newWorld(t, waiting())
	pause := 2 * time.Second
	for attempt := 1; ; attempt++ {
		w.look()
		if said := w.events(); len(w.ours()) != attempt || !strings.Contains(said, fmt.Sprintf("attempt %d of at most 6", attempt)) {
			t.Fatalf("%d migrations at attempt %d: %s", len(w.ours()), attempt, said)
		}
		w.now = w.now.Add(10 * time.Second)
		m := w.ours()[attempt-1]
		m.Status.Phase, m.Status.SourcePodUID = v1alpha1.PhaseRolledBack, "uid-of-redis"
		if attempt%2 == 0 {
			// It was refused before anything was known of the source.
			m.Status.Phase, m.Status.SourcePodUID = v1alpha1.PhaseRefused, ""
		}
		m.Status.Message = fmt.Sprintf("It went wrong for the %dth time.", attempt)
		m.Status.PhaseTransitions = []v1alpha1.PhaseTransition{{Phase: m.Status.Phase, Time: metav1.NewMicroTime(w.now)}}
		if err := w.Status().Update(t.Context(), &m); err != nil {
			t.Fatal(err)
		}
		if attempt == 6 {
			break
		}
		if again := w.look(); again != min(pause, lookAgain) || len(w.ours()) != attempt {
			t.Errorf("after attempt %d it looks again after %s", attempt, again)
		}
		w.now = w.now.Add(pause)
		pause *= 2
	}
	w.look()
	if said := w.events(); !strings.Contains(said, "MigrationGivenUp The pod could not be moved in 6 attempts, the last one: It went wrong for the 6th time.") {
		t.Errorf("it says %q", said)
	}
	if p := w.pod("redis"); deferral.HasFinalizer(p) || len(w.ours()) != 6 {
		t.Errorf("finalizers %v, %d migrations", p.Finalizers, len(w.ours()))
	}
}

// No pause reaches over the deadline.
func TestDeletionRetriesUntilTheDeadline(t *testing.T) {
	w := newWorld(t, waiting(deadline("101")))
	w.look()
	m := w.ours()[0]
	m.Status.Phase = v1alpha1.PhaseRefused
	m.Status.PhaseTransitions = []v1alpha1.PhaseTransition{{Phase: m.Status.Phase, Time: metav1.NewMicroTime(w.now)}}
	if err := w.Status().Update(t.Context(), &m); err != nil {
		t.Fatal(err)
	}
	if again := w.look(); again != time.Second {
		t.Errorf("it looks again after %s", again)
	}
	w.now = w.now.Add(time.Second)
	if w.look(); deferral.HasFinalizer(w.pod("redis")) {
		t.Error("it waits on")
	}
}

// The finalizers may change between a look at them and the removal of ours.
func TestDeletionRemovesNoOtherFinalizer(t *testing.T) {
	w := newWorld(t, waiting(forced))
	meanwhile := func() {
		p := w.pod("redis")
		p.Finalizers = []string{"example.com/first", other, v1alpha1.FinalizerMigrate}
		if err := w.Update(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	w.d.Client = interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			if meanwhile != nil {
				meanwhile()
				meanwhile = nil
			}
			err := c.Patch(ctx, o, p, opts...)
			if err != nil && apierrors.ReasonForError(err) == metav1.StatusReasonUnknown {
				// The fake gives the patch library's error, which the API server wraps like this.
				err = apierrors.NewGenericServerResponse(http.StatusUnprocessableEntity, "", schema.GroupResource{}, "", err.Error(), 0, false)
			}
			return err
		},
	})
	w.look()
	if p := w.pod("redis"); len(p.Finalizers) != 3 {
		t.Errorf("finalizers %v", p.Finalizers)
	}
	// The change is an event, so it looks again.
	w.look()
	if p := w.pod("redis"); fmt.Sprint(p.Finalizers) != "[example.com/first example.com/other]" {
		t.Errorf("finalizers %v", p.Finalizers)
	}
}

// Whoever has ordered a migration, its end is a reason to look at the pod.
func TestMovedBy(t *testing.T) {
	got := movedBy(t.Context(), theirs(v1alpha1.PhaseRolledBack, "uid-of-redis"))
	if len(got) != 1 || got[0] != request("redis") {
		t.Errorf("it looks at %v", got)
	}
}

// Each migration is "label number phase seconds [source]": whose it is, how it ended and
// how many seconds ago, and the UID that it knows of its source.
func TestNext(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, tt := range []struct {
		name, all string
		wait      time.Duration
		number    int
		givesUp   bool
	}{
		{"none", "", 0, 0, false},
		{"one waits", "me 0 Pending 0 me", 0, -1, false},
		{"one has not begun", "me 0 - 0", 0, -1, false},
		{"somebody else's runs", "- 0 Freezing 0 me", 0, -1, false},
		{"somebody else's waits", "- 0 - 0", 0, -1, false},
		{"it has moved", "me 0 Succeeded 60 me", 0, -1, false},
		{"it has moved at last", "me 0 RolledBack 60 me, me 1 Succeeded 60 me", 0, -1, false},
		{"one failed now", "me 0 RolledBack 0 me", 2 * time.Second, 1, false},
		{"one failed a second ago", "me 0 RolledBack 1 me", time.Second, 1, false},
		{"one failed long ago", "me 0 RolledBack 60 me", 0, 1, false},
		{"refused before its source was known", "me 0 Refused 0", 2 * time.Second, 1, false},
		{"cancelled", "me 0 Cancelled 0 me", 2 * time.Second, 1, false},
		{"two failed", "me 0 Refused 30 me, me 1 RolledBack 1 me", 3 * time.Second, 2, false},
		{"in another order", "me 1 RolledBack 1 me, me 0 Refused 30 me", 3 * time.Second, 2, false},
		{"the first was deleted", "me 1 RolledBack 60 me", 0, 2, false},
		{"one failed, the next runs", "me 0 RolledBack 60 me, me 1 Transferring 0 me", 0, -1, false},
		{"somebody else's failed", "- 0 RolledBack 0 me", 0, 0, false},
		{"an earlier pod's", "you 0 RolledBack 0 you", 0, 0, false},
		{"an earlier pod has moved", "- 0 Succeeded 0 you", 0, 0, false},
		{"another pod's runs", "- 0 Freezing 0 other", 0, 0, false},
		{"six failed", "me 0 Refused 99 me, me 1 Refused 90 me, me 2 Refused 80 me, me 3 Refused 70 me, me 4 Refused 60 me, me 5 Refused 0 me", 0, 0, true},
		{"six failed and somebody tries", "me 0 Refused 99 me, me 1 Refused 90 me, me 2 Refused 80 me, me 3 Refused 70 me, me 4 Refused 60 me, me 5 Refused 0 me, - 0 Freezing 0 me", 0, -1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var all []v1alpha1.PodMigration
			for text := range strings.SplitSeq(tt.all, ", ") {
				f := strings.Fields(text)
				if len(f) == 0 {
					continue
				}
				ago, err := time.ParseDuration(f[3] + "s")
				if err != nil {
					t.Fatal(err)
				}
				m := v1alpha1.PodMigration{Spec: v1alpha1.PodMigrationSpec{PodName: "redis"}}
				m.Name = "redis-0-abcdef-" + f[1]
				if f[0] != "-" {
					m.Labels = map[string]string{v1alpha1.LabelSourceUID: f[0]}
				}
				m.Status.Phase = v1alpha1.Phase(strings.Trim(f[2], "-"))
				m.Status.PhaseTransitions = []v1alpha1.PhaseTransition{{Phase: m.Status.Phase, Time: metav1.NewMicroTime(now.Add(-ago))}}
				if len(f) > 4 {
					m.Status.SourcePodUID = types.UID(f[4])
				}
				all = append(all, m)
			}
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "redis", UID: "me"}}
			if wait, number, why := next(p, all, now); wait != tt.wait || number != tt.number || (why != "") != tt.givesUp {
				t.Errorf("waits %s, number %d, %q", wait, number, why)
			}
		})
	}
}

// Nothing is created in a namespace that is being deleted, so nothing can move there.
func TestDeletionOfANamespace(t *testing.T) {
	w := newWorld(t, waiting())
	w.d.Client = interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
		Create: func(_ context.Context, _ client.WithWatch, o client.Object, _ ...client.CreateOption) error {
			err := apierrors.NewForbidden(schema.GroupResource{Group: v1alpha1.GroupVersion.Group, Resource: "podmigrations"}, o.GetName(), fmt.Errorf("it is being terminated"))
			err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
			return err
		},
	})
	w.look()
	if p := w.pod("redis"); p != nil && slices.Contains(p.Finalizers, v1alpha1.FinalizerMigrate) {
		t.Errorf("the pod waits: %v", p.Finalizers)
	}
	if said := w.events(); !strings.Contains(said, "The namespace is being deleted") {
		t.Errorf("it says %q", said)
	}
}
