package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/compare"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/wire"
)

// target is a migration to this node.
type target struct {
	a *Agent
	d *driver
	m *migration.Target
	// admitted is closed when the guard has let go of the clone.
	admitted chan struct{}
	admit    sync.Once
	// bytes of the checkpoint that have arrived.
	bytes atomic.Int64
	// expected is for how many nanoseconds the source would wait until what it has written is sent, 0 if
	// that is not known.
	expected atomic.Int64
	// writing is set while the transfer waits to be written to the clone.
	writing    atomic.Bool
	tellCloned sync.Once
	// create is signalled when the engine wants the clone's containers.
	create chan struct{}

	mu sync.Mutex
	// source is the connection to the source's kubelet, dialled when first needed.
	source Peer
	offer  *wire.OpenResponse
	// received is the stream on its way in; cut ends it.
	received io.ReadCloser
	cut      context.CancelFunc
	// freezing is closed when the request to freeze was answered; nil before it.
	freezing chan struct{}
	digest   string
	resumed  int64
	// frozen is for how long the pod stood still; 0 if that is not known.
	frozen time.Duration
	// since is when the phase of a name began.
	since map[string]time.Time
}

func (a *Agent) addTarget(m *migration.Target) *target {
	id := m.Identity()
	t := &target{a: a, m: m, create: make(chan struct{}, 1), admitted: make(chan struct{}), since: make(map[string]time.Time)}
	t.d = newDriver(a.ctx, migration.SideTarget, m, a.cfg.Journal)
	t.d.perform, t.d.point = t.perform, a.cfg.Point
	a.cfg.Guard.Set(id.Session, guard.Hold{
		WithholdStart: true, Started: a.touchLog,
		// Whoever ends the clone while it takes over cancels that, and waits until it is
		// clear who owns the pod.
		BeforeStop: func(ctx context.Context) error {
			t.d.post(migration.Cancelled{Message: "the clone is being stopped"})
			select {
			case <-t.d.done:
				return nil
			case <-t.admitted:
				return nil
			case <-ctx.Done():
				return fmt.Errorf("the pod is being taken over from pod %s: %w", id.SourcePod, ctx.Err())
			}
		},
	})
	// What was not restored yet answers no probe, also when a kubelet that restarted
	// believes that it runs.
	a.suspendProbes(id.Session, true)
	a.mu.Lock()
	a.targets[id.Session] = t
	a.mu.Unlock()
	a.cfg.Metrics.targetBegan()
	a.run(t.d, func() {
		a.suspendProbes(id.Session, false)
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.source != nil {
			t.source.Close()
			t.source = nil
		}
		a.cfg.Metrics.targetEnded(t.state())
	})
	return t
}

func (t *target) state() migration.TargetState {
	t.d.step.Lock()
	defer t.d.step.Unlock()
	return t.m.State()
}

func (t *target) outcome() (migration.Outcome, migration.Reason, string) {
	t.d.step.Lock()
	defer t.d.step.Unlock()
	return t.m.Outcome()
}

func (t *target) createContainers(ctx context.Context, pod *v1.Pod, create func(*v1.Pod) error) {
	if pod.Annotations[v1alpha1.AnnotationDryRun] != "" {
		// The source has compared and looked by now, and everything here is still as it was.
		t.d.post(migration.Cancelled{DryRun: true, Message: t.rehearsed(pod)})
		return
	}
	t.begin("create")
	if err := create(shell(pod)); err != nil {
		t.fail(migration.OpCreate, err)
		return
	}
	sandbox, all, err := t.a.cfg.Containers.Of(ctx, string(pod.UID))
	if err != nil {
		t.fail(migration.OpCreate, fmt.Errorf("list the containers of the clone: %w", err))
		return
	}
	var cs []migration.Container
	for _, c := range compare.Moving(&pod.Spec) {
		i := slices.IndexFunc(all, func(x Container) bool { return x.Name == c.Name })
		if i < 0 || !all[i].Created {
			t.fail(migration.OpCreate, fmt.Errorf("container %q was not created", c.Name))
			return
		}
		cs = append(cs, migration.Container{Name: c.Name, ID: all[i].ID})
	}
	t.end("create")
	t.d.post(migration.ContainersCreated{SandboxID: sandbox, Containers: cs})
}

// rehearsed says what a migration would do.
func (t *target) rehearsed(pod *v1.Pod) string {
	t.mu.Lock()
	offer := t.offer
	t.mu.Unlock()
	var names []string
	for _, c := range compare.Moving(&pod.Spec) {
		names = append(names, c.Name)
	}
	id := t.d.identity()
	text := fmt.Sprintf("Pod %s can move from node %s to node %s, with the containers %s.", id.SourcePod, id.PeerNode, t.a.cfg.Node.Name(), strings.Join(names, ", "))
	if offer == nil {
		return text
	}
	text += fmt.Sprintf(" They have %d MiB of memory and %d MiB of files.", offer.MemoryBytes>>20, offer.RootfsBytes>>20)
	for _, f := range offer.Findings {
		text += " Warning: " + wire.Sentence(f.Message, f.Cure)
	}
	return text
}

// transfer is how much has been moved, for everybody to see.
func (t *target) transfer() v1.PodCondition {
	t.mu.Lock()
	frozen := t.frozen
	t.mu.Unlock()
	text := fmt.Sprintf("%s=%d", v1alpha1.TransferBytes, t.bytes.Load())
	if e := time.Duration(t.expected.Load()); e > 0 {
		text += fmt.Sprintf(" %s=%d", v1alpha1.TransferExpected, e.Milliseconds())
	}
	if frozen > 0 {
		text += fmt.Sprintf(" %s=%d", v1alpha1.TransferFrozen, frozen.Milliseconds())
	}
	return v1.PodCondition{Type: v1alpha1.ConditionTransfer, Status: v1.ConditionTrue, Reason: "Measured", Message: text}
}

// tellTransfer writes how much has been moved, until ctx ends.
func (t *target) tellTransfer(ctx context.Context) {
	tick := time.NewTicker(transferInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		t.writeTransfer()
	}
}

// writeTransfer writes how much has been moved, unless that waits to be written already: with a slow
// API server nothing queues up in front of the outcome.
func (t *target) writeTransfer() {
	if !t.writing.CompareAndSwap(false, true) {
		return
	}
	t.d.inOrder(func(ctx context.Context) {
		t.writing.Store(false)
		id := t.d.identity()
		if err := t.a.cfg.API.PatchStatus(ctx, id.Namespace, id.ClonePod, id.Session, func(st *v1.PodStatus) { setCondition(st, t.transfer()) }); err != nil {
			t.d.log.V(2).Info("Progress could not be written to the clone", "err", err)
		}
	})
}

// transferInterval is how often it is told how much has been moved.
const transferInterval = time.Second

// begin and end measure phases. A phase that begins again, after a request that was
// lost, counts from its first beginning.
func (t *target) begin(phases ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range phases {
		if _, ok := t.since[p]; !ok {
			t.since[p] = time.Now()
		}
	}
}

func (t *target) end(phases ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range phases {
		// After a restart of the kubelet there is no beginning to count from.
		if since, ok := t.since[p]; ok {
			t.a.cfg.Metrics.phase(p, time.Since(since))
		}
	}
}

func (t *target) fail(op migration.Op, err error) {
	t.d.fail(op, err)
}

// perform carries out the effects of the target.
func (t *target) perform(effect migration.Effect) {
	switch e := effect.(type) {
	case migration.Call:
		t.d.start(func(ctx context.Context) { t.call(ctx, e) })
	case migration.CreateContainers:
		select {
		case t.create <- struct{}{}:
		default:
		}
	case migration.CutStream:
		t.mu.Lock()
		if t.cut != nil {
			t.cut()
		}
		t.mu.Unlock()
	case migration.Report:
		t.d.inOrder(func(ctx context.Context) { t.report(ctx, e) })
	case migration.PrepareRestore:
		t.d.callRuntime(false, t.prepare)
	case migration.ReceiveStream:
		t.d.start(func(ctx context.Context) { t.receive(ctx, e.Address) })
	case migration.VerifyRestore:
		t.d.callRuntime(true, t.verify)
	case migration.RestoreContainers:
		t.d.callRuntime(true, t.restore)
	case migration.InspectContainers:
		t.d.callRuntime(false, t.inspect)
	case migration.StopRestored:
		t.d.finishRuntime(t.stop)
	case migration.FinishRestore:
		t.d.finishRuntime(t.finish)
	case migration.AdmitRestored:
		id := t.m.Identity()
		t.a.mu.Lock()
		t.a.cloned[id.Session] = true
		t.a.mu.Unlock()
		t.a.suspendProbes(id.Session, false)
		t.a.cfg.Guard.Admit(id.Session)
		t.admit.Do(func() { close(t.admitted) })
	case migration.RecordOutcome:
		t.d.inOrder(func(ctx context.Context) { t.record(ctx, e) })
	default:
		t.d.log.Error(nil, "Target cannot carry out the effect", "effect", effect)
	}
}

func (t *target) report(ctx context.Context, e migration.Report) {
	id := t.d.identity()
	t.a.event(ctx, id.Namespace, id.ClonePod, id.Session, e.Warning, string(e.Reason), e.Message)
	err := t.a.cfg.API.PatchStatus(ctx, id.Namespace, id.ClonePod, id.Session, func(st *v1.PodStatus) {
		for _, c := range st.Conditions {
			// What the source has still to be told is no step back of the clone.
			if c.Type == conditionCloned && c.Status != v1.ConditionUnknown {
				return
			}
		}
		setCondition(st, v1.PodCondition{
			Type: conditionCloned, Status: v1.ConditionUnknown, Reason: string(e.Reason), Message: e.Message,
		})
	})
	if err != nil {
		t.d.log.V(2).Info("Progress could not be written to the clone", "err", err)
	}
}

func (t *target) prepare(ctx context.Context) {
	id := t.d.identity()
	pod, ok := t.a.cfg.Node.Pod(id.Session)
	if !ok {
		t.fail(migration.OpPrepareRestore, errors.New("the clone is not on this node any more"))
		return
	}
	req := &cri.PrepareRestoreRequest{
		SessionId: id.Session, PodSandboxId: id.SandboxID, Volumes: volumes(t.a.cfg.Node, pod), StreamVersion: cri.StreamVersion,
	}
	t.mu.Lock()
	if t.offer != nil {
		req.StreamVersion = t.offer.StreamVersion
	}
	t.mu.Unlock()
	for _, c := range id.Containers {
		req.Containers = append(req.Containers, &cri.RestoreTarget{ContainerId: c.ID, Name: c.Name})
	}
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	resp, err := t.a.cfg.Runtime.PrepareRestore(ctx, req)
	if err != nil {
		t.fail(migration.OpPrepareRestore, err)
		return
	}
	t.d.post(migration.RestorePrepared{Address: resp.StreamAddress})
}

func (t *target) verify(ctx context.Context) {
	resp, err := t.a.cfg.Runtime.VerifyRestore(ctx, &cri.VerifyRestoreRequest{SessionId: t.d.identity().Session})
	if err != nil {
		t.fail(migration.OpVerify, err)
		return
	}
	t.mu.Lock()
	t.digest = resp.ManifestDigest
	t.mu.Unlock()
	t.end("final")
	t.d.log.Info("Checkpoint is verified", "bytes", resp.StreamBytes, "manifest", resp.ManifestDigest)
	t.d.post(migration.Verified{})
}

// restore resumes all containers in parallel. One that failed does not cancel the
// others: the engine wants to know that every call has returned.
func (t *target) restore(ctx context.Context) {
	t.begin("restore")
	if err := t.awaitRuntime(ctx); err != nil {
		t.fail(migration.OpRestore, err)
		return
	}
	id := t.d.identity()
	var g errgroup.Group
	resumed := make([]int64, len(id.Containers))
	for i, c := range id.Containers {
		g.Go(func() error {
			resp, err := t.a.cfg.Runtime.RestoreContainer(ctx, &cri.RestoreContainerRequest{SessionId: id.Session, ContainerId: c.ID})
			if err != nil {
				return fmt.Errorf("container %q: %s", c.Name, message(err))
			}
			resumed[i] = resp.ResumedAt
			t.d.log.Info("Container is restored", "container", c.Name, "restoreNanoseconds", resp.RestoreDuration)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.fail(migration.OpRestore, err)
		return
	}
	t.mu.Lock()
	t.resumed = slices.Max(append(resumed, 0))
	if since, ok := t.since["frozen"]; ok {
		t.frozen = time.Since(since)
	}
	t.mu.Unlock()
	t.end("restore", "frozen")
	t.d.post(migration.Restored{})
}

// awaitRuntime waits for a runtime that is just being restarted; it knows the session
// when it is back. It gives up well before the engine does, so that no restore begins
// after the engine has decided that there will be none.
func (t *target) awaitRuntime(ctx context.Context) error {
	limit := t.a.cfg.Deadlines.Restore
	if limit <= 0 {
		limit = migration.DefaultDeadlines.Restore
	}
	ctx, cancel := context.WithTimeout(ctx, limit/2)
	defer cancel()
	if _, err := t.a.cfg.Runtime.Features(ctx, &cri.FeaturesRequest{}, grpc.WaitForReady(true)); err != nil {
		return fmt.Errorf("wait for the container runtime: %s", message(err))
	}
	return nil
}

// found looks at the containers of the clone.
func (t *target) found(ctx context.Context) (created, running int, err error) {
	_, all, err := t.a.cfg.Containers.Of(ctx, t.d.identity().Session)
	for _, c := range all {
		switch {
		case c.Running:
			running++
		case c.Created:
			created++
		}
	}
	return created, running, err
}

func (t *target) inspect(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	created, running, err := t.found(ctx)
	if err != nil {
		t.fail(migration.OpInspect, err)
		return
	}
	want := len(t.d.identity().Containers)
	found := migration.FoundMixed
	switch {
	case running == want:
		found = migration.FoundAll
	case created == want && running == 0:
		found = migration.FoundNone
	}
	t.d.post(migration.Inspected{Found: found})
}

// stop makes sure that no restored process exists.
func (t *target) stop(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	// A restore that this or an earlier kubelet began may still be under way and would
	// bring processes up after everything was found stopped. The end of the session lets
	// nothing resume any more, waits for what is under way and lets no other begin.
	if _, err := t.a.cfg.Runtime.FinishRestore(ctx, &cri.FinishRestoreRequest{SessionId: t.d.identity().Session}); err != nil {
		t.fail(migration.OpStopRestored, fmt.Errorf("end the restore: %w", err))
		return
	}
	for _, c := range t.d.identity().Containers {
		if err := t.a.cfg.Containers.Stop(ctx, c.ID); err != nil {
			t.fail(migration.OpStopRestored, fmt.Errorf("stop container %q: %w", c.Name, err))
			return
		}
	}
	_, running, err := t.found(ctx)
	if err == nil && running > 0 {
		err = fmt.Errorf("%d containers still run", running)
	}
	if err != nil {
		t.fail(migration.OpStopRestored, err)
		return
	}
	t.d.post(migration.RestoredStopped{})
}

func (t *target) finish(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	if _, err := t.a.cfg.Runtime.FinishRestore(ctx, &cri.FinishRestoreRequest{SessionId: t.d.identity().Session}); err != nil {
		t.fail(migration.OpFinishRestore, err)
		return
	}
	t.d.post(migration.RestoreFinished{})
}

// record writes the end of the migration to the clone.
func (t *target) record(ctx context.Context, e migration.RecordOutcome) {
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	id := t.d.identity()
	var err error
	if e.Cloned {
		err = t.recordSuccess(ctx, id, e.Message)
	} else {
		err = t.a.recordFailure(ctx, id, e.Reason, e.Message)
	}
	if err != nil && !t.a.gone(id.Session, err) {
		t.fail(migration.OpRecordOutcome, fmt.Errorf("write the outcome to the clone: %w", err))
		return
	}
	t.d.post(migration.OutcomeRecorded{})
}

// gone tells whether the API server refused to change a pod because it is not there
// any more. It tells a node Forbidden about such a pod.
func (a *Agent) gone(uid string, err error) bool {
	_, here := a.cfg.Node.Pod(uid)
	return apierrors.IsNotFound(err) || apierrors.IsForbidden(err) && !here
}

func (t *target) recordSuccess(ctx context.Context, id migration.Identity, text string) error {
	// Once, however often the API server is asked.
	t.tellCloned.Do(func() { t.a.event(ctx, id.Namespace, id.ClonePod, id.Session, false, v1alpha1.ReasonCloned, text) })
	return t.a.cfg.API.PatchStatus(ctx, id.Namespace, id.ClonePod, id.Session, func(st *v1.PodStatus) {
		if t.bytes.Load() > 0 {
			// A kubelet that was restarted does not know.
			setCondition(st, t.transfer())
		}
		setCondition(st, v1.PodCondition{Type: conditionCloned, Status: v1.ConditionTrue, Reason: v1alpha1.ReasonCloned, Message: text})
	})
}

func (a *Agent) recordFailure(ctx context.Context, id migration.Identity, reason migration.Reason, text string) error {
	change := func(st *v1.PodStatus) {
		st.Phase = v1.PodFailed
		st.Reason = string(reason)
		st.Message = text
		setCondition(st, v1.PodCondition{Type: conditionCloned, Status: v1.ConditionFalse, Reason: string(reason), Message: text})
	}
	pod, err := a.await(ctx, id.Namespace, id.ClonePod, id.Session)
	if err != nil {
		return err
	}
	if pod != nil {
		a.cfg.Node.Event(ctx, pod, reason != migration.ReasonDryRun, string(reason), text)
		a.cfg.Node.Terminate(ctx, pod, change)
	}
	a.cfg.Guard.Release(id.Session)
	return a.cfg.API.PatchStatus(ctx, id.Namespace, id.ClonePod, id.Session, change)
}
