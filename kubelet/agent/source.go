package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/wire"
)

// source is a migration away from this node.
type source struct {
	a *Agent
	d *driver
	m *migration.Source
	// offer is the answer to open; it is the same however often it is asked.
	offer *wire.OpenResponse
	// budget is for how long the pod may stand still until what it has written is sent.
	budget time.Duration

	mu       sync.Mutex
	requests map[migration.RequestID]chan<- reply
	// last request; the numbers of requests begin with 1.
	last migration.RequestID
	// cut ends the stream that is being sent.
	cut context.CancelFunc
	// free is closed while nothing keeps the kubelet from the pod, nil-safe through
	// guardPod and unguardPod.
	free chan struct{}
	held bool
}

// reply is what the engine says to one request.
type reply struct {
	err    error
	frozen *migration.FreezeFacts
	// address is set for a stream.
	address string
}

func (a *Agent) addSource(m *migration.Source) *source {
	id := m.Identity()
	s := &source{a: a, m: m, requests: make(map[migration.RequestID]chan<- reply), free: make(chan struct{})}
	close(s.free)
	s.d = newDriver(a.ctx, migration.SideSource, m, a.cfg.Journal)
	s.d.perform, s.d.point = s.perform, a.cfg.Point
	a.mu.Lock()
	a.sources[id.Session] = s
	a.pods[id.SourceUID] = id.Session
	a.mu.Unlock()
	a.run(s.d, func() { a.removeSource(s) })
	return s
}

func (a *Agent) removeSource(s *source) {
	id := s.d.identity()
	s.unguardPod()
	a.suspendProbes(id.SourceUID, false)
	if s.state() == migration.SourceReleased {
		a.wg.Add(1)
		go func() {
			defer a.wg.Done()
			a.forgetPod(id.SourceUID)
		}()
	}
	a.cfg.Metrics.sourceEnded(s.state())
	a.mu.Lock()
	defer a.mu.Unlock()
	// The session stays known until another one opens the pod, so that a repeated
	// request gets the answer that it would have got.
	delete(a.pods, id.SourceUID)
}

// epilogue asks a machine that is terminal: its loop has ended, and all that it still
// does is to answer.
func (s *source) epilogue(event func(migration.RequestID) migration.Event) (reply, error) {
	const id = 0
	s.d.step.Lock()
	effects, err := s.m.Step(event(id))
	s.d.step.Unlock()
	if err != nil {
		return reply{}, wire.Errorf(wire.CodeInternal, "%v", err)
	}
	for _, e := range effects {
		if a, ok := e.(migration.Answer); ok && a.Request == id {
			r := answerOf(a)
			return r, r.err
		}
	}
	return reply{}, wire.Errorf(wire.CodeInternal, "the session is over and does not answer")
}

func answerOf(e migration.Answer) reply {
	r := reply{frozen: e.Frozen}
	if e.Code != "" {
		r.err = &wire.Error{Code: wire.Code(e.Code), Message: e.Message}
	}
	return r
}

func (s *source) state() migration.SourceState {
	s.d.step.Lock()
	defer s.d.step.Unlock()
	return s.m.State()
}

func (s *source) terminal() bool {
	select {
	case <-s.d.done:
		return true
	default:
		return false
	}
}

func (s *source) guarded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

// guardPod keeps the kubelet and its users from the containers. What wants to stop
// them cancels the migration and waits until the engine lets go.
func (s *source) guardPod() {
	id := s.d.identity()
	s.mu.Lock()
	if !s.held {
		s.held = true
		s.free = make(chan struct{})
	}
	free := s.free
	s.mu.Unlock()
	s.a.cfg.Guard.Set(id.SourceUID, guard.Hold{
		Refuse: fmt.Sprintf("the pod is frozen for its migration to pod %s on node %s; try again there in a moment", id.ClonePod, id.PeerNode),
		BeforeStop: func(ctx context.Context) error {
			s.d.post(migration.Cancelled{Message: "the source pod is being stopped"})
			select {
			case <-free:
				return nil
			case <-s.d.done:
				return nil
			case <-ctx.Done():
				return fmt.Errorf("the pod was given away to pod %s on node %s, which has not yet said what became of it: %w", id.ClonePod, id.PeerNode, ctx.Err())
			}
		},
	})
}

func (s *source) unguardPod() {
	id := s.d.identity()
	released := s.state() == migration.SourceReleased
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held {
		s.held = false
		close(s.free)
	}
	if !released {
		s.a.cfg.Guard.Release(id.SourceUID)
		return
	}
	// The pod worker has been told to end the pod, but may still be busy with a sync
	// that saw the containers end and wants to start them again.
	s.a.cfg.Guard.Set(id.SourceUID, guard.Hold{
		Refuse: fmt.Sprintf("the pod runs on as pod %s on node %s", id.ClonePod, id.PeerNode),
	})
}

// forgetPod lets go of a pod that was taken over when the kubelet has forgotten it.
func (a *Agent) forgetPod(uid string) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		if _, ok := a.cfg.Node.Pod(uid); !ok {
			a.cfg.Guard.Release(uid)
			return
		}
		// The kubelet does not tell when.
		select {
		case <-a.ctx.Done():
			return
		case <-t.C:
		}
	}
}

// ask hands a request to the engine and waits for its answer.
func (s *source) ask(ctx context.Context, event func(migration.RequestID) migration.Event) (reply, error) {
	if s.terminal() && s.a.ctx.Err() == nil {
		return s.epilogue(event)
	}
	ch := make(chan reply, 1)
	s.mu.Lock()
	s.last++
	id := s.last
	s.requests[id] = ch
	s.mu.Unlock()
	s.d.post(event(id))
	select {
	case r := <-ch:
		return r, r.err
	case <-s.d.done:
		if s.a.ctx.Err() != nil {
			return reply{}, wire.Errorf(wire.CodeUnavailable, "%v", ErrClosed)
		}
		select {
		case r := <-ch:
			return r, r.err
		default:
			// The loop ended before it came to this request.
			return s.epilogue(event)
		}
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.requests, id)
		s.mu.Unlock()
		return reply{}, ctx.Err()
	}
}

func (s *source) answer(id migration.RequestID, r reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch, ok := s.requests[id]; ok {
		ch <- r
		delete(s.requests, id)
	}
}

// perform carries out the effects of the source.
func (s *source) perform(effect migration.Effect) {
	id := s.d.identity()
	switch e := effect.(type) {
	case migration.Answer:
		s.answer(e.Request, answerOf(e))
	case migration.SendStream:
		s.answer(e.Request, reply{address: e.Address})
	case migration.CutStream:
		s.mu.Lock()
		if s.cut != nil {
			s.cut()
		}
		s.mu.Unlock()
	case migration.GuardPod:
		s.guardPod()
	case migration.UnguardPod:
		s.unguardPod()
	case migration.SuspendProbes:
		s.a.suspendProbes(id.SourceUID, true)
	case migration.ResumeProbes:
		s.a.suspendProbes(id.SourceUID, false)
	case migration.Report:
		s.d.inOrder(func(ctx context.Context) { s.report(ctx, e) })
	case migration.PrepareCheckpoint:
		s.d.callRuntime(false, s.prepare)
	case migration.FreezeCheckpoint:
		s.d.callRuntime(true, s.freeze)
	case migration.FinishCheckpoint:
		s.d.finishRuntime(func(ctx context.Context) { s.finish(ctx, e.Outcome) })
	case migration.MarkMigrated:
		s.d.start(s.mark)
	case migration.AskTarget:
		s.d.start(s.askTarget)
	default:
		s.d.log.Error(nil, "Source cannot carry out the effect", "effect", effect)
	}
}

func (s *source) report(ctx context.Context, e migration.Report) {
	id := s.d.identity()
	s.a.event(ctx, id.Namespace, id.SourcePod, id.SourceUID, e.Warning, string(e.Reason), e.Message)
}

func (s *source) fail(op migration.Op, err error) {
	s.d.fail(op, err)
}

func (s *source) prepare(ctx context.Context) {
	id := s.d.identity()
	req := &cri.PrepareCheckpointRequest{
		SessionId:     id.Session,
		PodSandboxId:  id.SandboxID,
		StreamVersion: cri.StreamVersion,
		FreezeBudget:  int64(s.budget),
	}
	for _, c := range id.Containers {
		req.Containers = append(req.Containers, &cri.CheckpointContainer{ContainerId: c.ID, Name: c.Name})
	}
	pod, ok := s.a.cfg.Node.Pod(id.SourceUID)
	if !ok {
		s.fail(migration.OpPrepareCheckpoint, fmt.Errorf("the source pod is not on this node any more"))
		return
	}
	req.Volumes = volumes(s.a.cfg.Node, pod)
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	resp, err := s.a.cfg.Runtime.PrepareCheckpoint(ctx, req)
	if err != nil {
		s.fail(migration.OpPrepareCheckpoint, err)
		return
	}
	s.d.post(migration.CheckpointPrepared{Address: resp.StreamAddress})
}

// volumes are the volumes whose content moves with the pod.
func volumes(n Node, pod *v1.Pod) []*cri.Volume {
	var vs []*cri.Volume
	for _, v := range pod.Spec.Volumes {
		if v.EmptyDir != nil {
			vs = append(vs, &cri.Volume{Name: v.Name, HostPath: n.EmptyDir(string(pod.UID), v.Name)})
		}
	}
	return vs
}

func (s *source) freeze(ctx context.Context) {
	resp, err := s.a.cfg.Runtime.FreezeCheckpoint(ctx, &cri.FreezeCheckpointRequest{SessionId: s.d.identity().Session})
	if err != nil {
		s.fail(migration.OpFreeze, err)
		return
	}
	s.a.cfg.Metrics.frozen(resp)
	s.d.log.Info("Source pod is frozen", "bytes", resp.StreamBytes, "finalBytes", resp.FinalBytes,
		"freezeNanoseconds", resp.FreezeDuration, "dumpNanoseconds", resp.DumpDuration)
	s.d.post(migration.CheckpointFrozen{Facts: migration.FreezeFacts{
		FrozenAt: resp.FrozenAt, StreamBytes: resp.StreamBytes, FinalBytes: resp.FinalBytes,
		FreezeDuration: resp.FreezeDuration, DumpDuration: resp.DumpDuration,
	}})
}

func (s *source) finish(ctx context.Context, outcome migration.FinishOutcome) {
	id := s.d.identity()
	req := &cri.FinishCheckpointRequest{SessionId: id.Session, Outcome: cri.Outcome_OUTCOME_RESUME}
	if outcome == migration.FinishStop {
		req.Outcome = cri.Outcome_OUTCOME_STOP
	}
	for _, c := range id.Containers {
		req.ContainerIds = append(req.ContainerIds, c.ID)
	}
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	_, err := s.a.cfg.Runtime.FinishCheckpoint(ctx, req)
	// Containers that are gone need neither a thaw nor an end.
	if err != nil && status.Code(err) != codes.NotFound {
		s.fail(migration.OpFinishCheckpoint, err)
		return
	}
	s.d.post(migration.CheckpointFinished{})
}

// mark ends the source pod for good. The pod worker is told first, so that nothing
// is started in the pod when its containers end; then the API server gets the status
// at once, not when the last container is gone.
func (s *source) mark(ctx context.Context) {
	id := s.d.identity()
	change := func(st *v1.PodStatus) { markMigrated(st, id) }
	pod, err := s.a.await(ctx, id.Namespace, id.SourcePod, id.SourceUID)
	if err != nil {
		s.fail(migration.OpMark, err)
		return
	}
	if pod != nil {
		s.a.cfg.Node.Terminate(ctx, pod, change)
	}
	err = s.a.cfg.API.PatchStatus(ctx, id.Namespace, id.SourcePod, id.SourceUID, change)
	if err != nil && !s.a.gone(id.SourceUID, err) {
		s.fail(migration.OpMark, fmt.Errorf("write the final status of the source pod: %w", err))
		return
	}
	s.d.post(migration.SourceMarked{})
}

// markMigrated writes what a source pod looks like after it was taken over.
func markMigrated(st *v1.PodStatus, id migration.Identity) {
	text := fmt.Sprintf("The pod runs on as pod %s on node %s.", id.ClonePod, id.PeerNode)
	st.Phase = v1.PodFailed
	st.Reason = v1alpha1.ReasonMigrated
	st.Message = text
	setCondition(st, v1.PodCondition{
		Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1alpha1.ReasonMigrated, Message: text,
	})
}

// setCondition replaces a condition, keeping its transition time when the status
// stays the same.
func setCondition(st *v1.PodStatus, c v1.PodCondition) {
	c.LastTransitionTime = metav1.Now()
	for i := range st.Conditions {
		if st.Conditions[i].Type != c.Type {
			continue
		}
		if st.Conditions[i].Status == c.Status {
			c.LastTransitionTime = st.Conditions[i].LastTransitionTime
		}
		st.Conditions[i] = c
		return
	}
	st.Conditions = append(st.Conditions, c)
}

// askTarget finds out what became of the clone: its kubelet knows best, its condition
// knows when the kubelet does not answer or was made anew.
func (s *source) askTarget(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	id := s.d.identity()
	answer, err := s.askKubelet(ctx, id)
	if err == nil && answer.Outcome != wire.OutcomeGone {
		s.d.post(migration.TargetAnswered{Outcome: migration.Outcome(answer.Outcome), Reason: migration.Reason(answer.Reason), Message: answer.Message})
		return
	}
	// The condition is written once nothing is left to be decided. The phase is not
	// enough: other things than a migration end a pod.
	clone, readErr := s.a.cfg.API.Pod(ctx, id.Namespace, id.ClonePod)
	switch {
	case readErr == nil && string(clone.UID) == id.Session && IsCloned(clone):
		s.d.post(migration.TargetAnswered{Outcome: migration.OutcomeRestored})
	case readErr == nil && string(clone.UID) == id.Session && failed(clone):
		s.d.post(migration.TargetAnswered{Outcome: migration.OutcomeFailed, Reason: migration.Reason(clone.Status.Reason), Message: clone.Status.Message})
	case err == nil && (readErr == nil || apierrors.IsNotFound(readErr) || apierrors.IsForbidden(readErr)):
		// A target keeps its record until the source has confirmed the end, so a kubelet
		// that knows nothing never owned the pod.
		s.d.post(migration.TargetAnswered{Outcome: migration.OutcomeGone})
	default:
		if off, fenceErr := s.a.cfg.API.Fenced(ctx, id.PeerNode); fenceErr == nil && off {
			s.d.post(migration.PeerFenced{Message: fmt.Sprintf("node %s is marked as out of service", id.PeerNode)})
			return
		}
		s.d.post(migration.TargetAnswered{Outcome: migration.OutcomeUnknown, Message: message(errors.Join(err, readErr))})
	}
}

func (s *source) askKubelet(ctx context.Context, id migration.Identity) (*wire.OutcomeResponse, error) {
	p, err := s.a.peer(ctx, id)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	w := session(id)
	w.Pod = id.ClonePod
	return p.Outcome(ctx, w)
}

// streamOut is the body of a stream that is sent to the peer.
type streamOut struct {
	io.Reader
	close func() error
}

func (s streamOut) Close() error { return s.close() }
