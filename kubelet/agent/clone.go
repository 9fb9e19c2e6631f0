package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/compare"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/migration"
)

// touchLog makes the log file of a container whose start was withheld: the kubelet
// links to it when it believes the container started.
func (a *Agent) touchLog(ctx context.Context, id string) error {
	path, err := a.cfg.Containers.LogPath(ctx, id)
	if err != nil || path == "" {
		return err
	}
	return touch(path)
}

func touch(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}

// Takes tells whether a pod still has to take over its source.
func (a *Agent) Takes(pod *v1.Pod) bool {
	if a.cfg.Node.ClonePod(pod) == "" || IsCloned(pod) {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.cloned[string(pod.UID)]
}

// Sync takes the place of the runtime's SyncPod for a pod that Takes. It returns
// when the clone runs, or with the reason why it never will, and does not return
// before that unless the kubelet shuts down. When ctx ends, the migration is
// cancelled, as when the pod gets the annotation that asks for it. create makes
// sandbox and containers of the pod it is given, without starting them.
func (a *Agent) Sync(ctx context.Context, pod *v1.Pod, create func(*v1.Pod) error) error {
	t, err := a.target(ctx, pod)
	if err != nil {
		return err
	}
	cancelled := ctx.Done()
	// The kubelet brings a pod's changes to whoever synchronises it only when that is over.
	look := time.NewTicker(cancelInterval)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			if now, ok := a.cfg.Node.Pod(string(pod.UID)); ok && now.Annotations[v1alpha1.AnnotationCancel] != "" {
				look.Stop()
				t.d.post(migration.Cancelled{Message: "somebody asked to cancel the migration"})
			}
		case <-t.create:
			t.createContainers(ctx, pod, create)
		case <-cancelled:
			cancelled = nil
			t.d.post(migration.Cancelled{Message: "the clone is being deleted"})
		case <-t.d.done:
			if a.ctx.Err() != nil {
				return ErrClosed
			}
			if o, reason, text := t.outcome(); o != migration.OutcomeRestored {
				return fmt.Errorf("%s: %s", reason, text)
			}
			return nil
		}
	}
}

// cancelInterval is how often a clone is looked at whether it is to be given up.
const cancelInterval = 200 * time.Millisecond

// target returns the migration of a clone and begins it if need be.
func (a *Agent) target(ctx context.Context, pod *v1.Pod) (*target, error) {
	a.mu.Lock()
	t := a.targets[string(pod.UID)]
	a.mu.Unlock()
	if t != nil {
		return t, nil
	}
	if a.cfg.Draining {
		return nil, a.refuse(ctx, identity(a.cfg.Node, pod), migration.ReasonDisabled, disabled(a.cfg.Node))
	}
	name := a.cfg.Node.ClonePod(pod)
	source, err := a.findSource(ctx, pod)
	id := identity(a.cfg.Node, pod)
	switch {
	case apierrors.IsForbidden(err), apierrors.IsNotFound(err):
		text := fmt.Sprintf("There is no pod %q in namespace %q to take over; create the pod without clonePod, or name a running pod.", name, pod.Namespace)
		return nil, a.refuse(ctx, id, migration.ReasonSourceLost, text)
	case err != nil:
		return nil, fmt.Errorf("read the source pod %s: %w", name, err)
	case source.Spec.NodeName == "":
		text := fmt.Sprintf("Source pod %q is on no node yet; wait until it runs.", source.Name)
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, text)
	case source.Spec.NodeName == a.cfg.Node.Name():
		text := fmt.Sprintf("Source pod %q runs on node %s itself; place the clone on another node, for example with a node affinity.", source.Name, source.Spec.NodeName)
		return nil, a.refuse(ctx, id, migration.ReasonTargetUnfit, text)
	}
	if fs := compare.Pods(source, pod, time.Now()); len(fs) > 0 {
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, sentence(fs[0].String()))
	}
	if added := a.cfg.Node.AddedPrivileges(pod, source); len(added) > 0 {
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, sentence("the clone has privileges that its source lacks: "+added[0]))
	}
	id.SourceUID, id.PeerNode = string(source.UID), source.Spec.NodeName
	if err := a.prepareLogs(pod, source); err != nil {
		return nil, fmt.Errorf("prepare the log directories: %w", err)
	}
	t = a.addTarget(migration.NewTarget(a.locate(ctx, id), a.cfg.Deadlines))
	t.d.post(migration.Begun{})
	return t, nil
}

// identity is what is known of a migration before it begins.
func identity(n Node, clone *v1.Pod) migration.Identity {
	return migration.Identity{Session: string(clone.UID), Namespace: clone.Namespace, SourcePod: n.ClonePod(clone), ClonePod: clone.Name}
}

// disabled says why a node with the gate off takes no clone.
func disabled(n Node) string {
	return fmt.Sprintf("PodMigration is switched off on node %s; switch the feature gate PodMigration on there, or choose another node.", n.Name())
}

// findSource reads the pod that a clone takes over. The API server's authorizer may
// learn of the clone a moment after its kubelet and forbids the source until then. It
// forbids a source that is gone, too, and then for ever: an authorizer that lets the
// node read the clone knows everything that came before it.
func (a *Agent) findSource(ctx context.Context, clone *v1.Pod) (*v1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	var source *v1.Pod
	var final error
	err := retry(ctx, func(ctx context.Context) (err error) {
		source, err = a.cfg.API.Pod(ctx, clone.Namespace, a.cfg.Node.ClonePod(clone))
		if apierrors.IsForbidden(err) {
			if _, known := a.cfg.API.Pod(ctx, clone.Namespace, clone.Name); known != nil {
				return err
			}
			source, err = a.cfg.API.Pod(ctx, clone.Namespace, a.cfg.Node.ClonePod(clone))
		}
		if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
			final = err
			return nil
		}
		return err
	})
	if final != nil {
		err = final
	}
	return source, err
}

// findTimeout bounds the search for the source of a clone.
const findTimeout = 10 * time.Second

// sentence makes an error text fit for a condition.
func sentence(s string) string {
	if s == "" {
		return s
	}
	return string(s[0] - 'a' + 'A')[:1] + s[1:] + "."
}

// refuseTimeout bounds the attempts to write why a clone was refused.
const refuseTimeout = time.Minute

// refuse ends a clone before anything was begun for it.
func (a *Agent) refuse(ctx context.Context, id migration.Identity, reason migration.Reason, text string) error {
	// The pod worker cancels ctx as soon as it hears that the pod is to end, which is
	// the first thing that is done.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), refuseTimeout)
	defer cancel()
	err := retry(ctx, func(ctx context.Context) error {
		err := a.recordFailure(ctx, id, reason, text)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write the final status of the clone: %w", err)
	}
	return fmt.Errorf("%s: %s", reason, text)
}

// Refuse ends a clone on a node where migrations are switched off, and returns why.
func Refuse(ctx context.Context, n Node, api API, clone *v1.Pod) error {
	a := New(ctx, Config{Node: n, API: api, Guard: guard.New()})
	defer a.Close()
	return a.refuse(ctx, identity(n, clone), migration.ReasonDisabled, disabled(n))
}

// prepareLogs gives the new log directories files that make the kubelet count
// restarts from where the source is: it takes the highest number plus one.
func (a *Agent) prepareLogs(pod, source *v1.Pod) error {
	statuses := slices.Concat(source.Status.InitContainerStatuses, source.Status.ContainerStatuses)
	for _, c := range compare.Moving(&pod.Spec) {
		i := slices.IndexFunc(statuses, func(s v1.ContainerStatus) bool { return s.Name == c.Name })
		if i < 0 || statuses[i].RestartCount == 0 {
			continue
		}
		dir := a.cfg.Node.LogDirectory(pod, c.Name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := touch(filepath.Join(dir, strconv.Itoa(int(statuses[i].RestartCount)-1)+".log")); err != nil {
			return err
		}
	}
	return nil
}

// shell is the pod whose containers the kubelet creates for a clone: what moves, and
// nothing that would run before or beside it.
func shell(pod *v1.Pod) *v1.Pod {
	p := pod.DeepCopy()
	p.Spec.Containers = compare.Moving(&p.Spec)
	p.Spec.InitContainers = nil
	for i := range p.Spec.Containers {
		if l := p.Spec.Containers[i].Lifecycle; l != nil {
			l.PostStart = nil
		}
	}
	return p
}
