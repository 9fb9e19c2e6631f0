package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/compare"
	"podmig.dev/podmig/kubelet/deferral"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/snapshot"
	"podmig.dev/podmig/kubelet/wire"
)

var _ snapshot.Pods = (*Agent)(nil)

// Checkpointer is the part of the runtime that writes checkpoints of whole pods. The
// runtime's own limit of time must not be below that of the context.
type Checkpointer interface {
	CheckpointPod(ctx context.Context, r *runtimeapi.CheckpointPodRequest) error
}

// checkpointTimeout bounds how long a pod stands still for a checkpoint.
const checkpointTimeout = 5 * time.Minute

// eventCheckpointed is the reason of the event on a pod whose memory was read.
const eventCheckpointed = "Checkpointed"

// taking is a checkpoint that is being written.
type taking struct {
	cancel context.CancelCauseFunc
	// done is closed when the runtime has let go of the pod.
	done chan struct{}
	// guarded: the hold on the pod is that of the checkpoint.
	guarded bool
}

var errStopped = wire.Errorf(wire.CodeAborted, "the checkpoint was given up, because the pod is being stopped")

// Checkpoint writes a checkpoint of a running pod into an empty directory. Whatever it
// returns, the pod is not frozen any more, or the runtime resumes it as soon as it can.
// by is the user who asked, for the event.
func (a *Agent) Checkpoint(ctx context.Context, namespace, name, by, dir string) error {
	pod, ok := a.cfg.Node.PodByName(namespace, name)
	if !ok {
		return &wire.Error{
			Code:    wire.CodeUnknownPod,
			Message: fmt.Sprintf("pod %s/%s is not on node %s", namespace, name, a.cfg.Node.Name()),
			Cure:    "ask the node that the pod is bound to",
		}
	}
	if err := a.checkpointable(pod); err != nil {
		return err
	}
	ctx, stop := context.WithTimeoutCause(ctx, checkpointTimeout,
		wire.Errorf(wire.CodeDeadline, "the checkpoint was not written within %s, the pod runs on", checkpointTimeout))
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := &taking{cancel: cancel, done: make(chan struct{})}
	if err := a.beginTaking(pod, c); err != nil {
		return err
	}
	defer a.endTaking(pod, c)
	sandbox, containers, err := a.moving(ctx, pod)
	if err != nil {
		return err
	}
	if err := a.room(ctx, sandbox, containers, dir); err != nil {
		return err
	}
	a.guardTaking(pod, c)
	req := &runtimeapi.CheckpointPodRequest{PodSandboxId: sandbox, OutputPath: dir, Options: make(map[string]string)}
	for _, x := range containers {
		req.ContainerIds = append(req.ContainerIds, x.ID)
	}
	for _, v := range volumes(a.cfg.Node, pod) {
		req.Options[cri.VolumeOption+v.Name] = v.HostPath
	}
	began := time.Now()
	if err := a.cfg.Checkpointer.CheckpointPod(ctx, req); err != nil {
		return a.explain(ctx, err)
	}
	a.cfg.Node.Event(ctx, pod, false, eventCheckpointed,
		fmt.Sprintf("A checkpoint with the memory of the pod was written for user %q in %s; the pod runs on.", by, time.Since(began).Round(time.Millisecond)))
	return nil
}

// checkpointable refuses what the objects show.
func (a *Agent) checkpointable(pod *v1.Pod) error {
	notRunning := func(cure, format string, args ...any) error {
		e := wire.Errorf(wire.CodeNotRunning, format, args...)
		e.Cure = cure
		return e
	}
	switch {
	case a.Takes(pod):
		return notRunning("wait until it runs", "pod %s is a clone that has not taken over its source yet", pod.Name)
	case pod.DeletionTimestamp != nil && !deferral.Waits(pod, time.Now()):
		return notRunning("name a pod that stays", "pod %s is being deleted", pod.Name)
	case pod.Status.Phase != v1.PodRunning:
		phase := pod.Status.Phase
		if phase == "" {
			phase = v1.PodPending
		}
		return notRunning("name a pod that runs", "pod %s is %s, not Running", pod.Name, phase)
	}
	// What could be restored nowhere is refused as it is for a migration.
	return comparison(compare.Movable(pod))
}

// beginTaking notes a checkpoint, unless something else has the pod in its hands.
func (a *Agent) beginTaking(pod *v1.Pod, c *taking) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	uid := string(pod.UID)
	if session, moves := a.pods[uid]; moves {
		return &wire.Error{
			Code:    wire.CodeBusy,
			Message: fmt.Sprintf("pod %s is moving to another node (session %s)", pod.Name, session),
			Cure:    "wait until that migration has ended",
		}
	}
	if a.takings[uid] != nil {
		return &wire.Error{
			Code:    wire.CodeBusy,
			Message: fmt.Sprintf("a checkpoint of pod %s is being taken", pod.Name),
			Cure:    "wait until it has ended",
		}
	}
	// What is left to be done for the end of a migration holds the pod as well.
	if _, held := a.cfg.Guard.Held(uid); held || a.arriving(uid) {
		return &wire.Error{
			Code:    wire.CodeBusy,
			Message: fmt.Sprintf("a migration of pod %s has not quite ended", pod.Name),
			Cure:    "try again in a moment",
		}
	}
	a.takings[uid] = c
	return nil
}

// arriving tells whether a pod takes over another one, to the end. The caller holds mu.
func (a *Agent) arriving(uid string) bool {
	t := a.targets[uid]
	if t == nil {
		return false
	}
	select {
	case <-t.d.done:
		return false
	default:
		return true
	}
}

// guardTaking keeps kubelet and users from a pod that is about to be frozen: a probe
// would fail, and what is stopped would wait for a process that stands still.
func (a *Agent) guardTaking(pod *v1.Pod, c *taking) {
	uid := string(pod.UID)
	c.guarded = true
	a.suspendProbes(uid, true)
	a.cfg.Guard.Set(uid, guard.Hold{
		Refuse: "the pod is frozen for a checkpoint; try again in a moment",
		BeforeStop: func(ctx context.Context) error {
			c.cancel(errStopped)
			select {
			case <-c.done:
				return nil
			case <-ctx.Done():
				return fmt.Errorf("the runtime has not ended its checkpoint of the pod yet: %w", ctx.Err())
			}
		},
	})
}

func (a *Agent) endTaking(pod *v1.Pod, c *taking) {
	uid := string(pod.UID)
	if c.guarded {
		a.cfg.Guard.Release(uid)
		a.suspendProbes(uid, false)
	}
	close(c.done)
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.takings, uid)
}

// room asks the runtime what would prevent the checkpoint, and makes sure that it fits
// on the disk, because the node's pods need that, too.
func (a *Agent) room(ctx context.Context, sandbox string, containers []migration.Container, dir string) error {
	if _, err := a.wireFeatures(ctx); err != nil {
		return err
	}
	var need wire.OpenResponse
	if err := a.preflight(ctx, sandbox, containers, &wire.OpenRequest{}, &need); err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return wire.Errorf(wire.CodeInternal, "ask for the free space in %s: %v", dir, err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); need.MemoryBytes+need.RootfsBytes > free {
		return &wire.Error{
			Code:    wire.CodeUnavailable,
			Message: fmt.Sprintf("the checkpoint needs %d MiB and node %s has %d MiB for it", (need.MemoryBytes+need.RootfsBytes)>>20, a.cfg.Node.Name(), free>>20),
			Cure:    "free space where the kubelet keeps its files",
		}
	}
	return nil
}

// explain says why the runtime has written no checkpoint.
func (a *Agent) explain(ctx context.Context, err error) error {
	var e *wire.Error
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &e):
		return e
	case cause != nil:
		return cause
	}
	switch status.Code(err) {
	case codes.Unimplemented:
		return &wire.Error{
			Code:    wire.CodeNoRuntime,
			Message: fmt.Sprintf("the container runtime of node %s cannot take checkpoints of pods", a.cfg.Node.Name()),
			Cure:    "run a containerd with the migration service there",
		}
	case codes.FailedPrecondition:
		return wire.Errorf(wire.CodePreflight, "%s", message(err))
	}
	return wire.Errorf(wire.CodeRuntime, "%s", message(err))
}

// taken tells whether a checkpoint of a pod is being written. The caller holds mu.
func (a *Agent) taken(uid string) error {
	if a.takings[uid] == nil {
		return nil
	}
	return &wire.Error{
		Code:    wire.CodeBusy,
		Message: "a checkpoint of the pod is being taken",
		Cure:    "try again when it has ended",
	}
}
