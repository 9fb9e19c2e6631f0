package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
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
	"podmig.dev/podmig/kubelet/peer"
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
	a.mu.Lock()
	a.targets[id.Session] = t
	a.mu.Unlock()
	a.cfg.Metrics.targetBegan()
	a.run(t.d, func() {
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
// cancelled. create makes sandbox and containers of the pod it is given, without
// starting them.
func (a *Agent) Sync(ctx context.Context, pod *v1.Pod, create func(*v1.Pod) error) error {
	t, err := a.target(ctx, pod)
	if err != nil {
		return err
	}
	cancelled := ctx.Done()
	for {
		select {
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

// target returns the migration of a clone and begins it if need be.
func (a *Agent) target(ctx context.Context, pod *v1.Pod) (*target, error) {
	a.mu.Lock()
	t := a.targets[string(pod.UID)]
	a.mu.Unlock()
	if t != nil {
		return t, nil
	}
	name := a.cfg.Node.ClonePod(pod)
	var source *v1.Pod
	// The API server's authorizer learns of a new clone a moment after its kubelet.
	find, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := retry(find, func(ctx context.Context) (err error) {
		source, err = a.cfg.API.Pod(ctx, pod.Namespace, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
	id := migration.Identity{
		Session: string(pod.UID), Namespace: pod.Namespace, SourcePod: name, ClonePod: pod.Name,
	}
	switch {
	case apierrors.IsForbidden(err), err == nil && (source == nil || source.Name == ""):
		// A node is told Forbidden about pods that do not exist (any more).
		text := fmt.Sprintf("There is no pod %q in namespace %q to take over; create the pod without clonePod, or name a running pod.", name, pod.Namespace)
		return nil, a.refuse(ctx, id, migration.ReasonSourceLost, text)
	case err != nil:
		return nil, fmt.Errorf("read the source pod %s: %w", name, err)
	case source.Spec.NodeName == "":
		text := fmt.Sprintf("Source pod %q is on no node yet; wait until it runs.", source.Name)
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, text)
	case source.Spec.NodeName == a.cfg.Node.Name():
		text := fmt.Sprintf("Source pod %q runs on node %s itself; place the clone on another node, for example with a node affinity.", source.Name, source.Spec.NodeName)
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, text)
	}
	if fs := compare.Pods(source, pod); len(fs) > 0 {
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, sentence(fs[0].String()))
	}
	if added := a.cfg.Node.AddedPrivileges(pod, source); len(added) > 0 {
		return nil, a.refuse(ctx, id, migration.ReasonSourceRefused, sentence("the clone has privileges that its source lacks: "+added[0]))
	}
	id.SourceUID, id.PeerNode = string(source.UID), source.Spec.NodeName
	if err := a.prepareLogs(pod, source); err != nil {
		return nil, fmt.Errorf("prepare the log directories: %w", err)
	}
	t = a.addTarget(migration.NewTarget(id, a.cfg.Deadlines))
	t.d.post(migration.Begun{})
	return t, nil
}

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

func (t *target) createContainers(ctx context.Context, pod *v1.Pod, create func(*v1.Pod) error) {
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
	t.d.log.Error(err, "Migration step did not work", "operation", op)
	t.d.post(migration.RuntimeFailed{Op: op, Message: message(err)})
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
		t.d.callRuntime(false, t.restore)
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
		t.a.cfg.Guard.Release(id.Session)
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

// connection returns the connection to the source's kubelet.
func (t *target) connection(ctx context.Context) (Peer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.source == nil {
		p, err := t.a.peer(ctx, t.d.identity().PeerNode)
		if err != nil {
			return nil, err
		}
		t.source = p
	}
	return t.source, nil
}

// callTimeout bounds every request but the stream.
const callTimeout = 2 * time.Minute

// call sends one request to the source and tells the engine what became of it.
func (t *target) call(ctx context.Context, e migration.Call) {
	// The engine has its own, shorter deadlines and asks again; this one keeps a
	// connection that went silent from staying for ever.
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := t.request(ctx, e)
	if err != nil && peer.VerdictOf(err) == peer.VerdictNoAnswer {
		id := t.d.identity()
		if off, fenceErr := t.a.cfg.API.Fenced(ctx, id.PeerNode); fenceErr == nil && off {
			t.d.post(migration.PeerFenced{Message: fmt.Sprintf("node %s is marked as out of service", id.PeerNode)})
		}
	}
	answered := migration.Answered{Verb: e.Verb, Verdict: migration.Verdict(peer.VerdictOf(err))}
	if err != nil {
		answered.Code, answered.Message = migration.Code(wire.CodeOf(err)), message(err)
		t.d.log.Info("Source did not say yes", "request", e.Verb, "verdict", answered.Verdict, "err", err)
	}
	t.d.post(answered)
}

func (t *target) request(ctx context.Context, e migration.Call) error {
	p, err := t.connection(ctx)
	if err != nil {
		return err
	}
	id := t.d.identity()
	w := session(id)
	t.mu.Lock()
	digest, resumed := t.digest, t.resumed
	t.mu.Unlock()
	failure := &wire.FailureRequest{Reason: string(e.Reason), Message: e.Message}
	switch e.Verb {
	case migration.VerbOpen:
		return t.open(ctx, p, w, id)
	case migration.VerbStream:
		r, err := p.Stream(ctx, w)
		if err == nil {
			t.mu.Lock()
			t.received = r
			t.mu.Unlock()
		}
		return err
	case migration.VerbFreeze:
		t.begin("final", "frozen")
		freezing := make(chan struct{})
		t.mu.Lock()
		t.freezing = freezing
		t.mu.Unlock()
		defer close(freezing)
		_, err := p.Freeze(ctx, w, &wire.FreezeRequest{})
		return err
	case migration.VerbCommit:
		t.begin("commit")
		_, err := p.Commit(ctx, w, &wire.CommitRequest{ManifestDigest: digest})
		if err == nil {
			t.end("commit")
		}
		return err
	case migration.VerbDone:
		return p.Done(ctx, w, &wire.DoneRequest{ResumedAt: resumed})
	case migration.VerbFailed:
		return p.Failed(ctx, w, failure)
	case migration.VerbAbort:
		return p.Abort(ctx, w, failure)
	}
	return fmt.Errorf("no such request: %s", e.Verb)
}

func (t *target) open(ctx context.Context, p Peer, w wire.Session, id migration.Identity) error {
	pod, ok := t.a.cfg.Node.Pod(id.Session)
	if !ok {
		return wire.Errorf(wire.CodeAborted, "the clone is not on this node any more")
	}
	features, err := t.a.wireFeatures(ctx)
	if err != nil {
		return err
	}
	r := &wire.OpenRequest{
		Clone: id.ClonePod, SourceUID: id.SourceUID, TargetNode: t.a.cfg.Node.Name(), Features: features,
		Volumes: wireVolumes(pod), MemoryAvailable: t.a.cfg.Node.MemoryAvailable(),
	}
	for _, c := range compare.Moving(&pod.Spec) {
		tc := wire.TargetContainer{Name: c.Name, Image: c.Image, Sidecar: c.RestartPolicy != nil}
		for _, m := range c.VolumeMounts {
			tc.Mounts = append(tc.Mounts, m.MountPath)
		}
		slices.Sort(tc.Mounts)
		r.Containers = append(r.Containers, tc)
	}
	offer, err := p.Open(ctx, w, r)
	if err != nil {
		return err
	}
	for _, f := range offer.Findings {
		t.a.cfg.Node.Event(ctx, pod, true, f.Code, wire.Sentence(f.Message, f.Cure))
	}
	t.mu.Lock()
	t.offer = offer
	t.mu.Unlock()
	return nil
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

// receive copies the stream of the source to the runtime.
func (t *target) receive(ctx context.Context, address string) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t.mu.Lock()
	t.cut = cancel
	t.mu.Unlock()
	n, err := t.copyStream(ctx, address)
	t.a.cfg.Metrics.received(uint64(n))
	if err == nil {
		return
	}
	// A dump that fails breaks the stream, too. The answer to the freeze says why, and
	// it is on its way.
	t.mu.Lock()
	freezing := t.freezing
	t.mu.Unlock()
	if freezing != nil {
		select {
		case <-freezing:
		case <-ctx.Done():
		case <-time.After(whyTimeout):
		}
	}
	t.d.post(migration.StreamBroken{Message: err.Error()})
}

// whyTimeout is how long a broken stream waits for its reason.
const whyTimeout = 2 * time.Second

func (t *target) copyStream(ctx context.Context, address string) (int64, error) {
	t.mu.Lock()
	in := t.received
	t.received = nil
	t.mu.Unlock()
	if in == nil {
		p, err := t.connection(ctx)
		if err != nil {
			return 0, err
		}
		if in, err = p.Stream(ctx, session(t.d.identity())); err != nil {
			return 0, err
		}
	}
	defer in.Close()
	out, err := t.a.cfg.DialStream(ctx, address)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	stop := context.AfterFunc(ctx, func() { out.Close(); in.Close() })
	defer stop()
	// No rounds before the freeze yet: what is left is everything.
	t.d.post(migration.RoundsDone{})
	n, err := io.CopyBuffer(onlyWriter{out}, onlyReader{in}, make([]byte, 1<<20))
	if err != nil {
		return n, fmt.Errorf("after %d bytes of the checkpoint: %w", n, err)
	}
	return n, out.CloseWrite()
}

// onlyWriter and onlyReader keep io.Copy to the buffer it is given.
type onlyWriter struct{ io.Writer }
type onlyReader struct{ io.Reader }

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
	id := t.d.identity()
	var g errgroup.Group
	resumed := make([]int64, len(id.Containers))
	for i, c := range id.Containers {
		g.Go(func() error {
			// A runtime that is just being restarted knows the session when it is back; the
			// engine's deadline bounds the wait.
			resp, err := t.a.cfg.Runtime.RestoreContainer(ctx, &cri.RestoreContainerRequest{SessionId: id.Session, ContainerId: c.ID}, grpc.WaitForReady(true))
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
	t.mu.Unlock()
	t.end("restore", "frozen")
	t.d.post(migration.Restored{})
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
		err = t.a.recordSuccess(ctx, id, e.Message)
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

func (a *Agent) recordSuccess(ctx context.Context, id migration.Identity, text string) error {
	a.event(ctx, id.Namespace, id.ClonePod, id.Session, false, v1alpha1.ReasonCloned, text)
	return a.cfg.API.PatchStatus(ctx, id.Namespace, id.ClonePod, id.Session, func(st *v1.PodStatus) {
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
		a.cfg.Node.Event(ctx, pod, true, string(reason), text)
		a.cfg.Node.Terminate(ctx, pod, change)
	}
	a.cfg.Guard.Release(id.Session)
	return a.cfg.API.PatchStatus(ctx, id.Namespace, id.ClonePod, id.Session, change)
}
