//go:build e2e

package faults

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// Where a migration waits that no kubelet knows of yet.
const (
	// waitsTurn: another migration has the pod.
	waitsTurn = "controller.queue"
	// findsNoNode: its target takes no pods.
	findsNoNode = "scheduler.bind"
)

// More points, at which the source keeps the target waiting.
const (
	opens      = "source.answer-open-ok" // the target asks whether it may
	sendsFirst = "source.send-stream"    // the target waits for the first byte
)

// either is where a pod may run in the end if both are right.
const either = "either"

const (
	migrationName = "move"
	blockerName   = "first"
	// keeps is a finalizer of ours: an object that was deleted can be looked at.
	keeps = "podmig.dev/test"
)

var migrationResource = v1alpha1.GroupVersion.WithResource("podmigrations")

func (f *fault) objects() dynamic.ResourceInterface {
	return f.k.Dynamic.Resource(migrationResource).Namespace(f.k.Namespace)
}

// order makes a PodMigration.
func (f *fault) order(name string, spec v1alpha1.PodMigrationSpec) error {
	m := &v1alpha1.PodMigration{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	if name == migrationName {
		m.Finalizers = []string{keeps}
	}
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(m)
	if err != nil {
		return err
	}
	u := &unstructured.Unstructured{Object: o}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodMigration"))
	if _, err := f.objects().Create(f.ctx, u, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("order migration %s: %w", name, err)
	}
	return nil
}

// waitObject waits until a PodMigration is as the function wants it.
func (f *fault) waitObject(name, what string, is func(*v1alpha1.PodMigration) (bool, error)) (*v1alpha1.PodMigration, error) {
	selector := fields.OneTermEqualSelector("metadata.name", name).String()
	var last *v1alpha1.PodMigration
	_, err := watchtools.UntilWithSync(f.ctx, &cache.ListWatch{
		ListFunc: func(o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return f.objects().List(f.ctx, o)
		},
		WatchFunc: func(o metav1.ListOptions) (apiwatch.Interface, error) {
			o.FieldSelector = selector
			return f.objects().Watch(f.ctx, o)
		},
	}, &unstructured.Unstructured{}, nil, func(e apiwatch.Event) (bool, error) {
		u, ok := e.Object.(*unstructured.Unstructured)
		if !ok {
			return false, apierrors.FromObject(e.Object)
		}
		if e.Type == apiwatch.Deleted {
			return false, errors.New("it is gone")
		}
		last = &v1alpha1.PodMigration{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, last); err != nil {
			return false, err
		}
		return is(last)
	})
	if err != nil {
		return last, fmt.Errorf("wait for migration %s to be %s: %w; it is %s", name, what, err, tells(last))
	}
	return last, nil
}

// tells is what a PodMigration tells.
func tells(m *v1alpha1.PodMigration) string {
	if m == nil {
		return "unknown"
	}
	var phases []string
	for _, t := range m.Status.PhaseTransitions {
		phases = append(phases, string(t.Phase))
	}
	return fmt.Sprintf("%s, %s: %q", strings.Join(phases, " "), m.Status.Reason, m.Status.Message)
}

// goneObject waits until the API server does not know a PodMigration.
func (f *fault) goneObject(name string) error {
	return poll(f.ctx, "migration "+name+" is gone", func() error {
		_, err := f.objects().Get(f.ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err != nil:
			return err
		}
		return errors.New("it is there")
	})
}

// objectHeld waits until the object shows the phase in which it is held.
func (f *fault) objectHeld() error {
	m, err := f.waitObject(migrationName, string(f.held), func(m *v1alpha1.PodMigration) (bool, error) {
		if m.Status.Phase.Over() && m.Status.Phase != f.held {
			return false, errors.New("it has ended")
		}
		return m.Status.Phase == f.held && (f.at == waitsTurn || m.Status.ClonePodUID != ""), nil
	})
	if err == nil && m.Status.ClonePodName != "" {
		f.clone = m.Status.ClonePodName
	}
	return err
}

// objectSettled waits for the end of a migration and looks at the object and both pods.
func (f *fault) objectSettled() error {
	m, err := f.waitObject(migrationName, "over", func(m *v1alpha1.PodMigration) (bool, error) {
		return m.Status.Phase.Over() && slices.Equal(m.Finalizers, []string{keeps}), nil
	})
	if err != nil {
		return err
	}
	f.Log(tells(m))
	if f.ends == either {
		f.ends, f.over = source, v1alpha1.PhaseRolledBack
		if m.Status.Phase == v1alpha1.PhaseSucceeded {
			f.ends, f.over = target, m.Status.Phase
		}
	}
	if m.Status.Phase != f.over {
		return fmt.Errorf("the migration ended as %s, want %s", tells(m), f.over)
	}
	if f.ends != target && !slices.Contains(f.reasons, m.Status.Reason) {
		return fmt.Errorf("the migration ended as %s, want one of %v", tells(m), f.reasons)
	}
	var passed []v1alpha1.Phase
	for _, t := range m.Status.PhaseTransitions {
		passed = append(passed, t.Phase)
	}
	if i := len(passed) - 1; i < 0 || passed[i] != f.over || !inOrder(passed[:i]) {
		return fmt.Errorf("the migration went through %v", passed)
	}
	if m.Status.ClonePodName != "" {
		f.clone = m.Status.ClonePodName
	}
	if m.DeletionTimestamp != nil {
		if err := f.letGo(f.ctx, migrationName); err != nil {
			return err
		}
		if err := f.goneObject(migrationName); err != nil {
			return err
		}
	}
	if err := f.runs(f.ends, 25); err != nil {
		return err
	}
	if err := f.clones(m.UID); err != nil {
		return err
	}
	if f.ends == target {
		p, err := f.k.WaitRunning(f.ctx, f.clone)
		if err != nil {
			return err
		}
		if p.Spec.NodeName != f.lane[target] {
			return fmt.Errorf("the clone is on node %s", p.Spec.NodeName)
		}
		if err := neverRestarted(p); err != nil {
			return err
		}
	}
	return f.sourceTold()
}

// inOrder tells whether no phase came back; some may not have been seen.
func inOrder(phases []v1alpha1.Phase) bool {
	course := []v1alpha1.Phase{
		v1alpha1.PhasePending, v1alpha1.PhaseScheduling, v1alpha1.PhasePreparing,
		v1alpha1.PhaseTransferring, v1alpha1.PhaseFreezing, v1alpha1.PhaseRestoring,
	}
	for _, p := range phases {
		i := slices.Index(course, p)
		if i < 0 {
			return false
		}
		course = course[i+1:]
	}
	return true
}

// clones waits until a migration has only those that it is to have: the one that took
// over, none otherwise.
func (f *fault) clones(uid types.UID) error {
	want := []string{}
	if f.ends == target {
		want = append(want, f.clone)
	}
	return poll(f.ctx, "no clone that failed is left", func() error {
		all, err := f.k.Client.CoreV1().Pods(f.k.Namespace).List(f.ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		names := []string{}
		for _, p := range all.Items {
			if p.Name == sourcePod {
				continue
			}
			if owner := p.Labels[v1alpha1.LabelMigration]; f.ends == target && owner != string(uid) {
				return fmt.Errorf("pod %s is of migration %s", p.Name, owner)
			}
			names = append(names, p.Name)
		}
		if !slices.Equal(names, want) {
			return fmt.Errorf("the clones are %v, want %v", names, want)
		}
		return nil
	})
}

// letGo takes our finalizer from a PodMigration.
func (f *fault) letGo(ctx context.Context, name string) error {
	_, err := f.objects().Patch(ctx, name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("let go of migration %s: %w", name, err)
	}
	return nil
}

// dropObjects removes all PodMigrations of a scenario, whatever state they are in.
func (f *fault) dropObjects(ctx context.Context) error {
	for _, name := range []string{migrationName, blockerName} {
		if err := f.objects().Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
		if err := f.letGo(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// turn is a migration that waits for another one of the same pod.
type turn struct {
	f    *fault
	over bool
}

func (f *fault) setTurn() (*turn, error) {
	// Its clone finds no node, so it goes on until it is deleted.
	err := f.order(blockerName, v1alpha1.PodMigrationSpec{PodName: sourcePod, NodeSelector: map[string]string{"there": "none"}})
	if err != nil {
		return nil, err
	}
	_, err = f.waitObject(blockerName, "first", func(m *v1alpha1.PodMigration) (bool, error) { return m.Status.ClonePodUID != "", nil })
	return &turn{f: f}, err
}

func (t *turn) reached(context.Context) error {
	_, err := t.f.waitObject(migrationName, "queued", func(m *v1alpha1.PodMigration) (bool, error) {
		return m.Status.Reason == v1alpha1.MigrationQueued, nil
	})
	return err
}

func (t *turn) release() {
	if t.over {
		return
	}
	t.over = true
	if err := t.f.objects().Delete(t.f.ctx, blockerName, metav1.DeleteOptions{}); err != nil {
		t.f.Error(err)
	}
}

// cordon is a migration whose target takes no pods.
type cordon struct {
	f    *fault
	over bool
}

func (f *fault) setCordon() (*cordon, error) {
	c := &cordon{f: f}
	f.later(c.release)
	return c, c.set(true)
}

func (c *cordon) set(on bool) error {
	// Also when the scenario's time is up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.f.ctx), limit)
	defer cancel()
	patch := fmt.Appendf(nil, `{"spec":{"unschedulable":%t}}`, on)
	_, err := c.f.k.Client.CoreV1().Nodes().Patch(ctx, c.f.lane[target], types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

func (c *cordon) reached(context.Context) error {
	_, err := c.f.waitObject(migrationName, "without a node", func(m *v1alpha1.PodMigration) (bool, error) {
		return m.Status.Reason == v1.PodReasonUnschedulable, nil
	})
	return err
}

func (c *cordon) release() {
	if c.over {
		return
	}
	c.over = true
	if err := c.set(false); err != nil {
		c.f.Error(err)
	}
}

// cancel deletes the PodMigration.
func cancel(f *fault) error {
	return f.objects().Delete(f.ctx, migrationName, metav1.DeleteOptions{})
}

// over waits until the PodMigration has ended, while the migration stands at its point.
func over(f *fault) error {
	_, err := f.waitObject(migrationName, "over", func(m *v1alpha1.PodMigration) (bool, error) { return m.Status.Phase.Over(), nil })
	return err
}

// asked waits until the clone is asked to give up.
func asked(f *fault) error {
	_, err := f.k.WaitPod(f.ctx, f.clone, "asked to give up", func(p *v1.Pod) (bool, error) {
		return p.Annotations[v1alpha1.AnnotationCancel] != "", nil
	})
	return err
}

// movesOn waits until the kubelets are done with a migration that nobody looks at.
func movesOn(f *fault) error {
	_, err := f.k.WaitCloned(f.ctx, f.clone)
	if err != nil {
		return err
	}
	_, err = f.k.WaitPod(f.ctx, sourcePod, "migrated", func(p *v1.Pod) (bool, error) { return p.Status.Reason == v1alpha1.ReasonMigrated, nil })
	return err
}

// answers waits for the API server.
func answers(f *fault) error {
	return poll(f.ctx, "the API server answers", func() error {
		return f.k.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(f.ctx).Error()
	})
}

// A PodMigration that is deleted in every phase. Until the target has heard that the pod is
// its own the source runs on; afterwards the clone takes over all the same.
func TestFaultControllerCancel(t *testing.T) {
	cancelled := []string{v1alpha1.ReasonCancelled}
	before := func(at string, held v1alpha1.Phase) scenario {
		return scenario{name: "cancelled", at: at, held: held, breaks: all(cancel, over), ends: source, over: v1alpha1.PhaseCancelled, reasons: cancelled}
	}
	after := func(at string, held v1alpha1.Phase, arrives func(*fault) error) scenario {
		return scenario{name: "cancelled", at: at, held: held, breaks: all(cancel, arrives), ends: target, over: v1alpha1.PhaseSucceeded}
	}
	runAll(t, []scenario{
		before(waitsTurn, v1alpha1.PhasePending),
		before(findsNoNode, v1alpha1.PhaseScheduling),
		before(opens, v1alpha1.PhasePreparing),
		before(sendsFirst, v1alpha1.PhaseTransferring),
		before(freezes, v1alpha1.PhaseFreezing),
		before(givesAway, v1alpha1.PhaseFreezing),
		// It has given the pod away and nobody has heard it: it takes the pod back.
		before(givenAway, v1alpha1.PhaseFreezing),
		after(restores, v1alpha1.PhaseFreezing, asked),
		after(restored, v1alpha1.PhaseRestoring, asked),
		after(marksSource, v1alpha1.PhaseSucceeded, over),
	})
}

// points are one of every phase of a PodMigration.
var points = []struct {
	at   string
	held v1alpha1.Phase
}{
	{waitsTurn, v1alpha1.PhasePending},
	{findsNoNode, v1alpha1.PhaseScheduling},
	{opens, v1alpha1.PhasePreparing},
	{sendsFirst, v1alpha1.PhaseTransferring},
	{givesAway, v1alpha1.PhaseFreezing},
	{givenAway, v1alpha1.PhaseFreezing},
	{restored, v1alpha1.PhaseRestoring},
	{marksSource, v1alpha1.PhaseSucceeded},
}

// The controller is killed in every phase; the kubelets go on without it, and another one
// takes up what they have done.
func TestFaultControllerKilled(t *testing.T) {
	var every []scenario
	for _, p := range points {
		s := scenario{name: "controller killed", at: p.at, held: p.held, breaks: killController, after: all(movesOn, startController),
			ends: target, over: v1alpha1.PhaseSucceeded, alone: true}
		switch p.at {
		case waitsTurn:
			// Nobody begins it.
			s.after = startController
		case givesAway:
			// Once as it is when nobody helps.
			s.after, s.lasts = all(movesOn, succeedController), lease
		}
		every = append(every, s)
	}
	runAll(t, append(every, scenario{
		name: "controller of a ReplicaSet's pod killed", before: adopt, at: marksSource, held: v1alpha1.PhaseSucceeded,
		breaks: killController, after: all(movesOn, startController), ends: target, over: v1alpha1.PhaseSucceeded,
		// It is the controller that removes it.
		sourceGone: true, alone: true,
	}))
}

// adopt gives the source a ReplicaSet, which would replace it if it missed one.
func adopt(f *fault) error {
	labels := map[string]string{"counter": f.counters[0]}
	sets := f.k.Client.AppsV1().ReplicaSets(f.k.Namespace)
	_, err := sets.Create(f.ctx, &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Name: "set"},
		Spec: appsv1.ReplicaSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: v1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: v1.PodSpec{
				Containers: []v1.Container{{Name: "counter0", Image: "podmig.dev/counter:v1", ImagePullPolicy: v1.PullNever}},
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	f.later(func() {
		if err := sets.Delete(context.WithoutCancel(f.ctx), "set", metav1.DeleteOptions{}); err != nil {
			f.Error(err)
		}
	})
	_, err = f.k.WaitPod(f.ctx, sourcePod, "adopted", func(p *v1.Pod) (bool, error) { return metav1.GetControllerOf(p) != nil, nil })
	return err
}

// lease is how long a controller waits for one that has ended without a word.
const lease = 15 * time.Second

// absence is a time without the API server that two scenarios share: it goes when both
// stand at their points, and comes back when both have seen what they want without it.
type absence struct {
	lasts time.Duration

	mu      sync.Mutex
	waiting int
	turn    chan struct{} // closed when both are there
}

// together lets the last of both do something that the other waits for.
func (a *absence) together(f *fault, do func(*fault) error) error {
	a.mu.Lock()
	turn := a.turn
	if a.waiting++; a.waiting < len(lanes) {
		a.mu.Unlock()
		select {
		case <-turn:
			return nil
		case <-f.ctx.Done():
			return fmt.Errorf("wait for the other lane: %w", f.ctx.Err())
		}
	}
	a.waiting, a.turn = 0, make(chan struct{})
	a.mu.Unlock()
	defer close(turn)
	return do(f)
}

func (a *absence) begin(f *fault) error { return a.together(f, stop(hub, apiServer)) }

func (a *absence) end(f *fault) error {
	return a.together(f, all(pause(a.lasts), start(hub, apiServer), answers))
}

const apiServer = "kube-apiserver"

// rewatch is how long whoever has lost its watch may take until it asks again.
const rewatch = 75 * time.Second

// wake ends what waits for its next attempt to watch, up to a minute: what comes
// afterwards is no part of the scenario.
func wake(f *fault) error {
	for _, node := range []string{source, target} {
		if err := kill(node, cluster.Kubelet)(f); err != nil {
			return err
		}
	}
	return nil
}

// The API server is down in every phase. The kubelets go on without it as far as they
// can; the controller ends, and its successor reads how it went.
func TestFaultControllerAPIServer(t *testing.T) {
	t.Parallel()
	for i := 0; i < len(points); i += len(lanes) {
		pair := points[i : i+len(lanes)]
		a := &absence{lasts: 20 * time.Second, turn: make(chan struct{})}
		t.Run(fmt.Sprintf("%s, %s and %s", a.lasts, pair[0].at, pair[1].at), func(t *testing.T) {
			t.Parallel()
			whole.Lock()
			defer whole.Unlock()
			var both sync.WaitGroup
			for i, p := range pair {
				s := scenario{at: p.at, held: p.held, ends: target, over: v1alpha1.PhaseSucceeded, lasts: a.lasts + lease}
				switch p.at {
				case waitsTurn, findsNoNode:
					// What they wait for comes from the API server. Kubelets and scheduler ask for it up to a
					// minute after it is back.
					s.breaks, s.lasts = all(a.begin, a.end), s.lasts+rewatch
				case opens:
					// The source's kubelet asks it whether the target's may have the pod, unless it
					// has asked in the last minutes. If it cannot, the source runs on.
					s.breaks, s.after, s.ends = a.begin, a.end, either
					s.reasons = []string{v1alpha1.ReasonStreamFailed}
				default:
					s.breaks, s.after = a.begin, all(runsOn(target), a.end)
				}
				s.last = wake
				both.Go(func() { s.run(t, lanes[i]) })
			}
			both.Wait()
			for _, component := range []string{"kube-scheduler", "kube-controller-manager"} {
				if err := killDaemon(t.Context(), lanes[0][hub], component); err != nil {
					t.Error(err)
				}
			}
			mover.end(unix.SIGTERM)
			mover.start()
		})
	}
}
