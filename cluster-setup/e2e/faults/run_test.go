//go:build e2e

package faults

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/tools/clone"
)

// Names of the two pods of every test.
const (
	sourcePod = "source"
	clonePod  = "clone"
)

const podYAML = `
apiVersion: v1
kind: Pod
metadata: {name: source, labels: {counter: %s}}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: data, emptyDir: {}}
`

const containerYAML = `
  - name: %s
    image: podmig.dev/counter:v1
    imagePullPolicy: Never%s
    env:
    - {name: COUNTER_NAME, value: %s}
    - {name: COUNTER_OBSERVER, value: "%s:%s"}
    - {name: COUNTER_TICK, value: %s}
    - {name: COUNTER_FILE, value: /numbers}
    - {name: COUNTER_DIR, value: /data}
    - {name: COUNTER_LISTEN, value: ":%[7]d"}
    volumeMounts:
    - {name: data, mountPath: /data}
    readinessProbe: {httpGet: {path: /status, port: %[7]d}, periodSeconds: 1}
    livenessProbe: {httpGet: {path: /status, port: %[7]d}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}
`

// pod is one of counters that share a folder; the first of several is a sidecar.
func (f *fault) pod() string {
	var b strings.Builder
	fmt.Fprintf(&b, podYAML, f.counters[0], f.lane[source])
	for i, name := range f.counters {
		list, sidecar := "  containers:", ""
		if i == 0 && len(f.counters) > 1 {
			list, sidecar = "  initContainers:", "\n    restartPolicy: Always"
		}
		if i < 2 {
			b.WriteString(list)
		}
		fmt.Fprintf(&b, containerYAML, fmt.Sprintf("counter%d", i), sidecar, name, witnessAddress, witnessPort, pace, 8080+i)
	}
	return b.String()
}

// scenario is one thing that goes wrong at one point of a migration.
type scenario struct {
	name string
	// before, if set, is called when the source runs and nothing has begun.
	before func(*fault) error
	// at is the point: SIDE.EFFECT, or one of the places where a PodMigration object waits.
	at string
	// held, if set, says that a PodMigration object moves the pod: the phase that it has at
	// the point. over is the one in which it ends.
	held, over v1alpha1.Phase
	// breaks is called while the migration stands at the point.
	breaks func(*fault) error
	// after is called when it has been let go.
	after func(*fault) error
	// last, if set, is called when everything was looked at, before the pods are removed.
	last func(*fault) error
	// ends tells where the pod runs in the end: source, target, or nowhere.
	ends string
	// reasons are those of the clone's condition, or of the object, that are possible when
	// it did not take over; nil if the clone is gone.
	reasons []string
	// sourceGone, cloneGone: the scenario deletes the pod.
	sourceGone, cloneGone bool
	// alone: it breaks what others use.
	alone bool
	// lasts is how much longer than others it may take.
	lasts time.Duration
	// three: the pod has three containers, one of them a sidecar.
	three bool
}

// runAll runs scenarios, as many at a time as there are lanes.
func runAll(t *testing.T, all []scenario) {
	t.Parallel()
	for _, s := range all {
		t.Run(s.name+" at "+s.at, func(t *testing.T) {
			t.Parallel()
			if s.alone {
				whole.Lock()
				defer whole.Unlock()
			} else {
				whole.RLock()
				defer whole.RUnlock()
			}
			l := <-free
			defer func() { free <- l }()
			s.run(t, l)
		})
	}
}

// fault is a running scenario.
type fault struct {
	*testing.T
	scenario
	ctx  context.Context
	k    *kit.Kit
	lane lane
	// clone is the name of the pod that takes over.
	clone string
	// counters are the names by which the witness knows the containers.
	counters []string
	undo     []func()
}

// machine is the one that has a part in the scenario.
func (f *fault) machine(part string) (netns.Machine, error) { return f.k.Cluster.Machine(f.lane[part]) }

// runs waits until every container has sent some numbers from now on.
func (f *fault) runs(part string, count int) error {
	for _, name := range f.counters {
		if err := watch.runs(f.ctx, name, part, count); err != nil {
			return err
		}
	}
	return nil
}

// still makes sure that no container counts for a while.
func (f *fault) still(how time.Duration) error {
	return watch.still(f.ctx, f.counters, how)
}

// neverRestarted looks at all containers of a pod.
func neverRestarted(p *v1.Pod) error {
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if c.RestartCount != 0 {
			return fmt.Errorf("container %s of pod %s has restarted %d times", c.Name, p.Name, c.RestartCount)
		}
	}
	return nil
}

// later is done when the scenario is over, however it ends.
func (f *fault) later(undo func()) { f.undo = append(f.undo, undo) }

// limit bounds one scenario.
const limit = 40 * time.Second

// sweep bounds the time until nothing is left of a scenario. What a kubelet that was
// killed has stopped by half, a sandbox whose network is still there, its successor
// finds in the collection of garbage that it does every minute.
const sweep = limit + time.Minute

func (s scenario) run(t *testing.T, l lane) {
	if err := s.try(t, l); err != nil {
		t.Errorf("%s: %v", s.at, err)
	}
}

// try returns the first thing that went wrong, when everything is put back.
func (s scenario) try(t *testing.T, l lane) (err error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), limit+s.lasts)
	defer cancel()
	if err := l.ready(ctx); err != nil {
		return err
	}
	id := "f-" + strings.ToLower(rand.Text()[:8])
	k, err := admin.In(ctx, id)
	if err != nil {
		return err
	}
	f := &fault{T: t, scenario: s, ctx: ctx, k: k, lane: l, clone: clonePod, counters: []string{id}}
	if s.three {
		f.counters = []string{id + "-a", id + "-b", id + "-c"}
	}
	defer func() { f.end(err) }()
	if err := f.move(); err != nil {
		return err
	}
	settled := f.settled
	if s.held != "" {
		settled = f.objectSettled
	}
	if err := settled(); err != nil {
		return err
	}
	var h history
	for _, name := range f.counters {
		one, err := watch.check(name)
		if err != nil {
			return err
		}
		if h.nodes != nil && !slices.Equal(h.nodes, one.nodes) {
			return fmt.Errorf("%s ran on %v, another container on %v", name, one.nodes, h.nodes)
		}
		h = one
	}
	want := []string{source}
	if f.ends == target {
		want = []string{source, target}
	}
	if f.ends == "" {
		if err := f.still(outage); err != nil {
			return err
		}
	} else if !slices.Equal(h.nodes, want) {
		return fmt.Errorf("the pod ran on %v, want %v", h.nodes, want)
	}
	t.Logf("%s; %s and %s, %s", h, l[source], l[target], time.Since(began).Round(10*time.Millisecond))
	if f.last != nil {
		return f.last(f)
	}
	return nil
}

// move starts a migration and breaks it.
func (f *fault) move() error {
	if err := f.k.Create(f.ctx, f.pod()); err != nil {
		return err
	}
	if _, err := f.k.WaitRunning(f.ctx, sourcePod); err != nil {
		return err
	}
	if err := f.runs(source, 5); err != nil {
		return err
	}
	if f.before != nil {
		if err := f.before(f); err != nil {
			return err
		}
	}
	p, err := f.setHold()
	if err != nil {
		return err
	}
	defer p.release()
	if f.held != "" {
		err = f.order(migrationName, v1alpha1.PodMigrationSpec{PodName: sourcePod, TargetNode: f.lane[target]})
	} else {
		err = f.k.Clone(f.ctx, sourcePod, clone.Options{Name: clonePod, Node: f.lane[target]})
	}
	if err != nil {
		return err
	}
	if err := p.reached(f.ctx); err != nil {
		return err
	}
	if f.held != "" {
		if err := f.objectHeld(); err != nil {
			return err
		}
	}
	if err := f.breaks(f); err != nil {
		return fmt.Errorf("while it stood at %s: %w", f.at, err)
	}
	p.release()
	if f.after == nil {
		return nil
	}
	if err := f.after(f); err != nil {
		return fmt.Errorf("after it stood at %s: %w", f.at, err)
	}
	return nil
}

// hold is where a migration stands until it is let go.
type hold interface {
	reached(ctx context.Context) error
	release()
}

func (f *fault) setHold() (hold, error) {
	switch f.at {
	case waitsTurn:
		return f.setTurn()
	case findsNoNode:
		return f.setCordon()
	}
	return f.setPoint(side(f.at), f.at)
}

// settled waits for the end of the migration and looks at both pods.
func (f *fault) settled() error {
	_, err := f.k.WaitCloned(f.ctx, clonePod)
	switch {
	case f.cloneGone:
		// Its deletion is over when the node has let go of it.
		if err := f.gone(clonePod); err != nil {
			return err
		}
	case f.ends == target && err != nil:
		return err
	case f.ends != target && err == nil:
		return errors.New("the clone took over")
	case f.ends != target && !errors.Is(err, kit.ErrNotCloned):
		return err
	}
	if f.ends != "" {
		if err := f.runs(f.ends, 25); err != nil {
			return err
		}
	}
	if err := f.cloneTold(); err != nil {
		return err
	}
	return f.sourceTold()
}

// cloneTold checks what the API server knows about the clone.
func (f *fault) cloneTold() error {
	if f.cloneGone {
		return nil
	}
	p, err := f.k.Pod(f.ctx, clonePod)
	if err != nil {
		return err
	}
	c := kit.Condition(p, v1alpha1.ConditionCloned)
	if f.ends == target {
		if p, err = f.k.WaitRunning(f.ctx, clonePod); err != nil {
			return err
		}
		return neverRestarted(p)
	}
	f.Logf("%s: %s", c.Reason, c.Message)
	if !slices.Contains(f.reasons, c.Reason) || c.Message == "" {
		return fmt.Errorf("the clone says %s: %q, want one of %v", c.Reason, c.Message, f.reasons)
	}
	if p.Status.Phase != v1.PodFailed {
		if _, err := f.k.WaitPod(f.ctx, clonePod, "failed", func(p *v1.Pod) (bool, error) { return p.Status.Phase == v1.PodFailed, nil }); err != nil {
			return err
		}
	}
	if !f.said(clonePod, c.Reason) {
		return fmt.Errorf("the clone has no event %s", c.Reason)
	}
	return nil
}

// said tells whether a pod has an event with a reason.
func (f *fault) said(pod, reason string) bool {
	return slices.ContainsFunc(f.k.Events(f.ctx, pod), func(e v1.Event) bool { return e.Reason == reason })
}

// sourceTold checks what the API server knows about the source.
func (f *fault) sourceTold() error {
	if f.sourceGone {
		return f.gone(sourcePod)
	}
	if f.ends == target || f.ends == "" && f.cloneGone {
		_, err := f.k.WaitPod(f.ctx, sourcePod, "migrated", func(s *v1.Pod) (bool, error) {
			return s.Status.Phase == v1.PodFailed && s.Status.Reason == v1alpha1.ReasonMigrated, nil
		})
		return err
	}
	p, err := f.k.WaitRunning(f.ctx, sourcePod)
	if err != nil {
		return err
	}
	if err := neverRestarted(p); err != nil {
		return err
	}
	// It can be entered again.
	_, err = f.k.Kubectl(f.ctx, "exec", sourcePod, "--", "/nothing")
	if err == nil || !strings.Contains(err.Error(), "/nothing") {
		return fmt.Errorf("the source cannot be entered: %w", err)
	}
	return nil
}

// gone waits until the API server does not know a pod.
func (f *fault) gone(pod string) error {
	for {
		_, err := f.k.Pod(f.ctx, pod)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-f.ctx.Done():
			return fmt.Errorf("pod %s stays: %w", pod, f.ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// end puts back what the scenario changed, removes its pods and looks for leftovers.
func (f *fault) end(failed error) {
	ctx, cancel := context.WithTimeout(context.Background(), sweep)
	defer cancel()
	if failed != nil {
		f.tell(ctx)
	}
	for _, undo := range slices.Backward(f.undo) {
		undo()
	}
	for _, node := range []string{source, target} {
		if err := f.clearPoints(node); err != nil {
			f.Error(err)
		}
	}
	if f.held != "" {
		if err := f.dropObjects(ctx); err != nil {
			f.Error(err)
		}
	}
	for _, pod := range []string{f.clone, sourcePod} {
		if err := f.k.Delete(ctx, pod); err != nil {
			f.Error(err)
		}
	}
	if err := f.k.Client.CoreV1().Namespaces().Delete(ctx, f.k.Namespace, metav1.DeleteOptions{}); err != nil {
		f.Error(err)
	}
	var both sync.WaitGroup
	for _, node := range []string{source, target} {
		both.Go(func() { clean(ctx, f.T, f.lane[node]) })
	}
	both.Wait()
}

// tell shows what there is to know about a scenario that failed.
func (f *fault) tell(ctx context.Context) {
	for _, name := range f.counters {
		f.Logf("last numbers of %s: %v", name, tail(watch.of(name), 10))
	}
	text, err := f.k.Kubectl(ctx, "get", "pods,podmigrations,events", "-o", "wide")
	f.Logf("in the end: %v\n%s", err, text)
	if b, err := os.ReadFile(mover.log); err == nil && f.held != "" {
		f.Logf("controller:\n%s", strings.Join(tail(strings.Split(string(b), "\n"), 40), "\n"))
	}
	for _, node := range []string{source, target} {
		m, err := f.machine(node)
		if err != nil {
			f.Log(err)
			continue
		}
		for _, daemon := range []string{"kubelet", "containerd"} {
			b, err := os.ReadFile(filepath.Join(m.Logs(), daemon+".log"))
			if err != nil {
				f.Log(err)
				continue
			}
			var mine []string
			for line := range strings.SplitSeq(string(b), "\n") {
				if strings.Contains(line, f.k.Namespace) || strings.Contains(line, "fault point") ||
					daemon == "containerd" && (strings.Contains(line, "migration") || strings.Contains(line, "session")) {
					mine = append(mine, line)
				}
			}
			f.Logf("%s of %s:\n%s", daemon, node, strings.Join(tail(mine, 40), "\n"))
		}
	}
}

// kill ends a daemon at once; its supervisor starts it again.
func kill(node, daemon string) func(*fault) error {
	return func(f *fault) error { return killDaemon(f.ctx, f.lane[node], daemon) }
}

// killDaemon returns when the daemon has ended.
func killDaemon(ctx context.Context, node, daemon string) error {
	m, err := admin.Cluster.Machine(node)
	if err != nil {
		return err
	}
	restarts := func() (int, error) {
		all, err := m.Supervisor().Status(ctx)
		i := slices.IndexFunc(all, func(s supervisor.Status) bool { return s.Name == daemon })
		if err != nil || i < 0 {
			return 0, fmt.Errorf("find %s on %s: %w", daemon, node, err)
		}
		return all[i].Restarts, nil
	}
	before, err := restarts()
	if err != nil {
		return err
	}
	if err := m.Supervisor().Kill(ctx, daemon, unix.SIGKILL); err != nil {
		return err
	}
	for {
		now, err := restarts()
		if err != nil || now > before {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of %s on %s: %w", daemon, node, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// stop ends a daemon and leaves it down until start.
func stop(node, daemon string) func(*fault) error {
	return func(f *fault) error {
		m, err := f.machine(node)
		if err != nil {
			return err
		}
		f.later(func() {
			if err := m.Supervisor().Start(context.Background(), daemon); err != nil {
				f.Error(err)
			}
		})
		// Not in order: what it has under way is cut off.
		if err := killDaemon(f.ctx, f.lane[node], daemon); err != nil {
			return err
		}
		return m.Supervisor().Stop(f.ctx, daemon)
	}
}

// start lets a daemon run again.
func start(node, daemon string) func(*fault) error {
	return func(f *fault) error {
		m, err := f.machine(node)
		if err != nil {
			return err
		}
		return m.Supervisor().Start(f.ctx, daemon)
	}
}

// cut unplugs the cable of a node.
func cut(node string) func(*fault) error {
	return func(f *fault) error {
		f.later(func() {
			if err := f.k.Cluster.SetLink(f.lane[node], true); err != nil {
				f.Error(err)
			}
		})
		return f.k.Cluster.SetLink(f.lane[node], false)
	}
}

// heal plugs it in again.
func heal(node string) func(*fault) error {
	return func(f *fault) error { return f.k.Cluster.SetLink(f.lane[node], true) }
}

// pause lets a fault last for some time.
func pause(d time.Duration) func(*fault) error {
	return func(f *fault) error {
		select {
		case <-time.After(d):
			return nil
		case <-f.ctx.Done():
			return f.ctx.Err()
		}
	}
}

// frozen makes sure that nobody counts, for the time that a fault is to last.
func frozen(d time.Duration) func(*fault) error {
	return func(f *fault) error { return f.still(d) }
}

// runsOn waits until the pod counts on a node.
func runsOn(node string) func(*fault) error {
	return func(f *fault) error { return f.runs(node, 5) }
}

// knowsFrozen waits until the source's kubelet has heard from its runtime that the pod is frozen. The
// target can have verified everything before that.
func knowsFrozen(f *fault) error {
	for {
		if slices.ContainsFunc(f.k.Events(f.ctx, sourcePod), func(e v1.Event) bool { return e.Reason == v1alpha1.EventFrozen }) {
			return nil
		}
		select {
		case <-f.ctx.Done():
			return fmt.Errorf("the source does not say that it is frozen: %w", f.ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// remove deletes a pod without waiting for its end.
func remove(pod string) func(*fault) error {
	return func(f *fault) error {
		grace := int64(1)
		return f.k.Client.CoreV1().Pods(f.k.Namespace).Delete(f.ctx, pod, metav1.DeleteOptions{GracePeriodSeconds: &grace})
	}
}

// waitGone waits until a pod is gone.
func waitGone(pod string) func(*fault) error {
	return func(f *fault) error { return f.gone(pod) }
}

// all does one thing after the other.
func all(steps ...func(*fault) error) func(*fault) error {
	return func(f *fault) error {
		for _, step := range steps {
			if err := step(f); err != nil {
				return err
			}
		}
		return nil
	}
}
