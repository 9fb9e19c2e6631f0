package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/klog/v2"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/compare"
	"podmig.dev/podmig/kubelet/deferral"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
)

var _ peer.Sessions = (*Agent)(nil)

// StreamConn is a connection to a stream of the runtime.
type StreamConn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// DialStream connects to a stream address of a runtime on this machine.
func DialStream(ctx context.Context, address string) (StreamConn, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "unix" {
		return nil, fmt.Errorf("stream address %q is not a unix socket", address)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", u.Path)
	if err != nil {
		return nil, fmt.Errorf("connect to the runtime's stream: %w", err)
	}
	return c.(*net.UnixConn), nil
}

// message is what of an error is worth telling the user.
func message(err error) string {
	if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
		return s.Message()
	}
	return err.Error()
}

// session finds the session of a call and makes sure that the caller is its target.
func (a *Agent) session(c peer.Call) (*source, error) {
	a.mu.Lock()
	s := a.sources[c.ID]
	a.mu.Unlock()
	if s == nil {
		return nil, wire.Errorf(wire.CodeUnknownSession, "there is no migration %s on this node", c.ID)
	}
	id := s.d.identity()
	if id.PeerNode != c.Caller.Node || id.Namespace != c.Namespace || id.SourcePod != c.Pod {
		return nil, forbidden(c)
	}
	return s, nil
}

// forbidden does not tell which part was wrong.
func forbidden(c peer.Call) *wire.Error {
	return wire.Errorf(wire.CodeForbidden, "node %s is not the node of a clone of pod %s/%s with this UID", c.Caller.Node, c.Namespace, c.Pod)
}

// Open authorises the target, says whether the pod can move to it, and begins.
func (a *Agent) Open(ctx context.Context, c peer.Call, r *wire.OpenRequest) (*wire.OpenResponse, error) {
	if s, err := a.session(c); err == nil {
		if s.offer == nil {
			return nil, wire.Errorf(wire.CodeWrongState, "the kubelet of the source has restarted since the migration began")
		}
		if _, err := s.ask(ctx, func(id migration.RequestID) migration.Event { return migration.OpenRequested{Request: id} }); err != nil {
			return nil, err
		}
		return s.offer, nil
	} else if wire.CodeOf(err) != wire.CodeUnknownSession {
		return nil, err
	}
	clone, err := a.authorise(ctx, c, r)
	if err != nil {
		return nil, err
	}
	if a.cfg.Draining {
		return nil, &wire.Error{
			Code:    wire.CodeDisabled,
			Message: fmt.Sprintf("PodMigration is switched off on node %s", a.cfg.Node.Name()),
			Cure:    "switch the feature gate PodMigration on there",
		}
	}
	pod, ok := a.cfg.Node.PodByName(c.Namespace, c.Pod)
	if !ok {
		// A kubelet that has just been started does not know its pods yet.
		if pod, err = a.await(ctx, c.Namespace, c.Pod, r.SourceUID); err != nil {
			return nil, wire.Errorf(wire.CodeUnavailable, "%v", err)
		}
		ok = pod != nil
	}
	if !ok || string(pod.UID) != r.SourceUID {
		return nil, wire.Errorf(wire.CodeUnknownPod, "pod %s/%s with UID %s is not on node %s", c.Namespace, c.Pod, r.SourceUID, a.cfg.Node.Name())
	}
	if err := comparison(compare.Pods(pod, clone, time.Now())); err != nil {
		return nil, err
	}
	budget, err := freezeBudget(clone)
	if err != nil {
		return nil, err
	}
	if added := a.cfg.Node.AddedPrivileges(clone, pod); len(added) > 0 {
		return nil, wire.Errorf(wire.CodeForbidden, "the clone has privileges that its source lacks: %s", added[0])
	}
	// A preflight of a pod that stands still for a checkpoint would find other things.
	a.mu.Lock()
	err = a.taken(r.SourceUID)
	a.mu.Unlock()
	if err != nil {
		return nil, err
	}
	offer, err := a.features(ctx, pod, r)
	if err != nil {
		return nil, err
	}
	sandbox, containers, err := a.moving(ctx, pod)
	if err != nil {
		return nil, err
	}
	if err := a.preflight(ctx, sandbox, containers, r, offer); err != nil {
		return nil, err
	}
	s, err := a.begin(a.locate(ctx, migration.Identity{
		Session: c.ID, Namespace: c.Namespace, SourcePod: c.Pod, SourceUID: r.SourceUID,
		ClonePod: clone.Name, PeerNode: c.Caller.Node, SandboxID: sandbox, Containers: containers,
	}), offer, budget)
	if err != nil {
		return nil, err
	}
	if _, err := s.ask(ctx, func(id migration.RequestID) migration.Event { return migration.OpenRequested{Request: id} }); err != nil {
		return nil, err
	}
	return offer, nil
}

// freezeBudget reads what the clone says about the freeze; 0 if it says nothing.
func freezeBudget(clone *v1.Pod) (time.Duration, error) {
	text, ok := clone.Annotations[v1alpha1.AnnotationFreezeBudget]
	if !ok {
		return 0, nil
	}
	ms, err := strconv.ParseUint(text, 10, 31)
	if err != nil || ms == 0 {
		return 0, &wire.Error{
			Code:    wire.CodeMismatch,
			Message: fmt.Sprintf("the annotation %s of the clone is %q, which is no number of milliseconds", v1alpha1.AnnotationFreezeBudget, text),
			Cure:    "give a whole number above 0, or leave the annotation out",
		}
	}
	return time.Duration(ms) * time.Millisecond, nil
}

// authorise makes sure that the caller is the node of a clone that names the source
// and returns that clone.
func (a *Agent) authorise(ctx context.Context, c peer.Call, r *wire.OpenRequest) (*v1.Pod, error) {
	if r.TargetNode != c.Caller.Node {
		return nil, forbidden(c)
	}
	var clone *v1.Pod
	// One of several API servers may not have heard of the clone yet and forbids what
	// it will allow in a moment. Whoever has no right waits for the refusal.
	read, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	err := retry(read, func(ctx context.Context) (err error) {
		clone, err = a.cfg.API.Pod(ctx, c.Namespace, r.Clone)
		return err
	})
	switch {
	case apierrors.IsNotFound(err), apierrors.IsForbidden(err):
		// A node may read a pod only if it clones one of the node's own.
		klog.FromContext(ctx).V(2).Info("Clone cannot be read", "err", err)
		return nil, forbidden(c)
	case err != nil:
		return nil, wire.Errorf(wire.CodeUnavailable, "read the clone pod: %v", err)
	case string(clone.UID) != c.ID || a.cfg.Node.ClonePod(clone) != c.Pod || clone.Spec.NodeName != c.Caller.Node:
		return nil, forbidden(c)
	case clone.DeletionTimestamp != nil && !deferral.Waits(clone, time.Now()):
		return nil, wire.Errorf(wire.CodeAborted, "clone pod %s is being deleted", clone.Name)
	}
	return clone, nil
}

// comparison turns what differs between two pods into the answer to open.
func comparison(fs []compare.Finding) error {
	if len(fs) == 0 {
		return nil
	}
	e := &wire.Error{Code: wire.CodeMismatch, Message: fs[0].Message, Cure: fs[0].Cure}
	if fs[0].Code == compare.CodeNotRunning || fs[0].Code == compare.CodeTerminating {
		e.Code = wire.CodeNotRunning
	}
	for _, f := range fs {
		e.Findings = append(e.Findings, wire.Finding{
			Severity: wire.SeverityBlocking, Code: f.Code, Container: f.Container, Message: f.Message, Cure: f.Cure,
		})
	}
	return e
}

// wireFeatures asks the runtime what this node can do.
func (a *Agent) wireFeatures(ctx context.Context) (wire.Features, error) {
	f, err := a.cfg.Runtime.Features(ctx, &cri.FeaturesRequest{})
	switch {
	case status.Code(err) == codes.Unimplemented:
		return wire.Features{}, &wire.Error{
			Code:    wire.CodeNoRuntime,
			Message: fmt.Sprintf("the container runtime of node %s cannot move pods", a.cfg.Node.Name()),
			Cure:    "run a containerd with the migration service on both nodes",
		}
	case err != nil:
		return wire.Features{}, wire.Errorf(wire.CodeUnavailable, "ask the runtime of node %s for its features: %s", a.cfg.Node.Name(), message(err))
	case f.CriuVersion == "":
		return wire.Features{}, &wire.Error{
			Code:    wire.CodeNoRuntime,
			Message: fmt.Sprintf("there is no CRIU on node %s", a.cfg.Node.Name()),
			Cure:    "install CRIU on both nodes",
		}
	}
	return wire.Features{
		StreamVersions: f.StreamVersions, RuntimeName: f.RuntimeName, RuntimeVersion: f.RuntimeVersion,
		OCIRuntimeName: f.OciRuntimeName, OCIRuntimeVersion: f.OciRuntimeVersion, CRIUVersion: f.CriuVersion,
		KernelRelease: f.KernelRelease, Architecture: f.Architecture, CPUFeatures: f.CpuFeatures, CgroupMode: f.CgroupMode,
		WriteTracking: f.Kernel.GetWriteTracking(), SoftDirty: f.Kernel.GetSoftDirty(),
		LazyPages: f.Kernel.GetLazyPages(), TimeNamespace: f.Kernel.GetTimeNamespace(),
	}, nil
}

// features checks that processes of this node can live on the target.
func (a *Agent) features(ctx context.Context, pod *v1.Pod, r *wire.OpenRequest) (*wire.OpenResponse, error) {
	have, err := a.wireFeatures(ctx)
	if err != nil {
		return nil, err
	}
	incompatible := func(cure, format string, args ...any) error {
		e := wire.Errorf(wire.CodeIncompatible, format, args...)
		e.Cure = cure
		return e
	}
	if have.Architecture != r.Features.Architecture {
		return nil, incompatible("choose a target of the same architecture",
			"node %s is %s and node %s is %s", a.cfg.Node.Name(), have.Architecture, r.TargetNode, r.Features.Architecture)
	}
	var missing []string
	for _, f := range have.CPUFeatures {
		if !slices.Contains(r.Features.CPUFeatures, f) {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		return nil, incompatible("choose a target whose CPU has every feature of the source's",
			"the CPU of node %s lacks %s, which the processes may use", r.TargetNode, strings.Join(missing, ", "))
	}
	i := slices.IndexFunc(have.StreamVersions, func(v uint32) bool { return slices.Contains(r.Features.StreamVersions, v) })
	if i < 0 {
		return nil, incompatible("run runtimes on both nodes that share a version",
			"the runtime of node %s writes stream versions %v and that of node %s reads %v", a.cfg.Node.Name(), have.StreamVersions, r.TargetNode, r.Features.StreamVersions)
	}
	offer := &wire.OpenResponse{
		StreamVersion: have.StreamVersions[i], SourceNode: a.cfg.Node.Name(), Features: have,
	}
	statuses := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses)
	for _, c := range compare.Moving(&pod.Spec) {
		wc := wire.SourceContainer{Name: c.Name, Image: c.Image, Sidecar: c.RestartPolicy != nil}
		for _, st := range statuses {
			if st.Name == c.Name {
				wc.ImageDigest, wc.RestartCount = st.ImageID, st.RestartCount
				if st.State.Running != nil {
					wc.StartedAt = st.State.Running.StartedAt.UnixNano()
				}
			}
		}
		offer.Containers = append(offer.Containers, wc)
	}
	offer.Volumes = wireVolumes(pod)
	return offer, nil
}

// wireVolumes are the volumes of a pod whose content moves.
func wireVolumes(pod *v1.Pod) []wire.Volume {
	var vs []wire.Volume
	for _, v := range pod.Spec.Volumes {
		if v.EmptyDir != nil {
			vs = append(vs, wire.Volume{Name: v.Name, Kind: "emptyDir"})
		}
	}
	return vs
}

// moving returns the runtime's containers whose processes move.
func (a *Agent) moving(ctx context.Context, pod *v1.Pod) (string, []migration.Container, error) {
	sandbox, all, err := a.cfg.Containers.Of(ctx, string(pod.UID))
	if err != nil {
		return "", nil, wire.Errorf(wire.CodeUnavailable, "list the containers of the pod: %s", message(err))
	}
	var cs []migration.Container
	for _, c := range compare.Moving(&pod.Spec) {
		i := slices.IndexFunc(all, func(x Container) bool { return x.Name == c.Name && x.Running })
		if i < 0 {
			return "", nil, wire.Errorf(wire.CodeNotRunning, "container %q of pod %s is not running", c.Name, pod.Name)
		}
		cs = append(cs, migration.Container{Name: c.Name, ID: all[i].ID})
	}
	return sandbox, cs, nil
}

// preflight asks the runtime what would prevent a checkpoint.
func (a *Agent) preflight(ctx context.Context, sandbox string, containers []migration.Container, r *wire.OpenRequest, offer *wire.OpenResponse) error {
	req := &cri.PreflightPodRequest{PodSandboxId: sandbox}
	names := make(map[string]string)
	for _, c := range containers {
		req.ContainerIds = append(req.ContainerIds, c.ID)
		names[c.ID] = c.Name
	}
	resp, err := a.cfg.Runtime.PreflightPod(ctx, req)
	if err != nil {
		return wire.Errorf(wire.CodeRuntime, "preflight: %s", message(err))
	}
	offer.MemoryBytes, offer.RootfsBytes = resp.MemoryBytes, resp.RootfsBytes
	var blocking *wire.Finding
	for _, f := range resp.Findings {
		w := wire.Finding{
			Severity: wire.SeverityWarning, Code: f.Code, Container: names[f.ContainerId], PID: f.Pid, Message: f.Message, Cure: f.Cure,
		}
		if f.Fd >= 0 && f.Pid > 0 {
			w.FD = &f.Fd
		}
		if f.Severity == cri.Finding_SEVERITY_BLOCKING {
			w.Severity = wire.SeverityBlocking
		}
		offer.Findings = append(offer.Findings, w)
		if w.Severity == wire.SeverityBlocking && blocking == nil {
			blocking = &offer.Findings[len(offer.Findings)-1]
		}
	}
	if blocking != nil {
		return &wire.Error{Code: wire.CodePreflight, Message: blocking.Message, Cure: blocking.Cure, Findings: offer.Findings}
	}
	if r.MemoryAvailable > 0 && resp.MemoryBytes > r.MemoryAvailable {
		return &wire.Error{
			Code:    wire.CodeNoMemory,
			Message: fmt.Sprintf("the pod needs %d MiB of memory and node %s has %d MiB", resp.MemoryBytes>>20, r.TargetNode, r.MemoryAvailable>>20),
			Cure:    "choose a target with more free memory",
		}
	}
	return nil
}

// begin makes the machine, unless another session has the pod.
func (a *Agent) begin(id migration.Identity, offer *wire.OpenResponse, budget time.Duration) (*source, error) {
	a.mu.Lock()
	other, busy := a.pods[id.SourceUID]
	if err := a.taken(id.SourceUID); err != nil {
		a.mu.Unlock()
		return nil, err
	}
	if !busy {
		a.pods[id.SourceUID] = id.Session
		// What is over is forgotten when the next one begins.
		for session, s := range a.sources {
			if s.terminal() && s.d.identity().SourceUID == id.SourceUID {
				delete(a.sources, session)
			}
		}
	}
	a.mu.Unlock()
	if busy {
		return nil, &wire.Error{
			Code:    wire.CodeBusy,
			Message: fmt.Sprintf("the pod is already moving (session %s)", other),
			Cure:    "wait until that migration has ended, or delete its clone",
		}
	}
	s := a.addSource(migration.NewSource(id, a.cfg.Deadlines))
	s.offer, s.budget = offer, budget
	a.cfg.Metrics.sourceBegan()
	return s, nil
}

// Status tells where a session stands.
func (a *Agent) Status(_ context.Context, c peer.Call) (*wire.StatusResponse, error) {
	s, err := a.session(c)
	if err != nil {
		return nil, err
	}
	return &wire.StatusResponse{State: string(s.state())}, nil
}

// Stream sends the checkpoint.
func (a *Agent) Stream(ctx context.Context, c peer.Call) (*peer.Stream, error) {
	s, err := a.session(c)
	if err != nil {
		return nil, err
	}
	r, err := s.ask(ctx, func(id migration.RequestID) migration.Event { return migration.StreamRequested{Request: id} })
	if ctx.Err() != nil {
		// Whoever asked has gone: a stream that begins now has no reader.
		s.d.post(migration.StreamBroken{Message: "the target went away before the stream began"})
	}
	if err != nil {
		return nil, err
	}
	conn, err := a.cfg.DialStream(ctx, r.address)
	if err != nil {
		s.d.post(migration.StreamBroken{Message: err.Error()})
		return nil, wire.Errorf(wire.CodeRuntime, "%v", err)
	}
	cut, cancel := context.WithCancel(s.d.ctx)
	stop := context.AfterFunc(cut, func() { conn.Close() })
	s.mu.Lock()
	s.cut = cancel
	s.mu.Unlock()
	return &peer.Stream{
		Version: s.version(),
		Body: streamOut{Reader: conn, close: func() error {
			stop()
			cancel()
			return conn.Close()
		}},
		Sent: func(bytes uint64, err error) {
			a.cfg.Metrics.sent(bytes)
			if err != nil {
				s.d.post(migration.StreamBroken{Message: err.Error()})
				return
			}
			s.d.post(migration.StreamSent{})
		},
	}, nil
}

func (s *source) version() uint32 {
	if s.offer != nil {
		return s.offer.StreamVersion
	}
	return cri.StreamVersion
}

// Freeze freezes the pod and returns when everything was handed to the stream.
func (a *Agent) Freeze(ctx context.Context, c peer.Call, _ *wire.FreezeRequest) (*wire.FreezeResponse, error) {
	s, err := a.session(c)
	if err != nil {
		return nil, err
	}
	r, err := s.ask(ctx, func(id migration.RequestID) migration.Event { return migration.FreezeRequested{Request: id} })
	if err != nil {
		return nil, err
	}
	if r.frozen == nil {
		return nil, wire.Errorf(wire.CodeInternal, "the freeze has no figures")
	}
	return &wire.FreezeResponse{
		FrozenAt: r.frozen.FrozenAt, StreamBytes: r.frozen.StreamBytes, FinalBytes: r.frozen.FinalBytes,
		FreezeDuration: r.frozen.FreezeDuration, DumpDuration: r.frozen.DumpDuration,
	}, nil
}

// Commit gives the pod away.
func (a *Agent) Commit(ctx context.Context, c peer.Call, r *wire.CommitRequest) (*wire.CommitResponse, error) {
	s, err := a.session(c)
	if err != nil {
		return nil, err
	}
	s.d.log.Info("Target asks for the pod", "manifest", r.ManifestDigest)
	if _, err := s.ask(ctx, func(id migration.RequestID) migration.Event { return migration.CommitRequested{Request: id} }); err != nil {
		return nil, err
	}
	return &wire.CommitResponse{}, nil
}

// Done stops the source.
func (a *Agent) Done(ctx context.Context, c peer.Call, _ *wire.DoneRequest) error {
	s, err := a.session(c)
	if err != nil {
		return err
	}
	_, err = s.ask(ctx, func(id migration.RequestID) migration.Event { return migration.DoneReported{Request: id} })
	return err
}

// Failed takes the pod back.
func (a *Agent) Failed(ctx context.Context, c peer.Call, r *wire.FailureRequest) error {
	s, err := a.session(c)
	if err != nil {
		return err
	}
	_, err = s.ask(ctx, func(id migration.RequestID) migration.Event {
		return migration.FailedReported{Request: id, Reason: migration.Reason(r.Reason), Message: r.Message}
	})
	return err
}

// Abort ends a migration before the commit.
func (a *Agent) Abort(ctx context.Context, c peer.Call, r *wire.FailureRequest) error {
	s, err := a.session(c)
	if err != nil {
		return err
	}
	_, err = s.ask(ctx, func(id migration.RequestID) migration.Event {
		return migration.AbortRequested{Request: id, Reason: migration.Reason(r.Reason), Message: r.Message}
	})
	return err
}

// Outcome tells the node of the source what became of a clone on this node.
func (a *Agent) Outcome(ctx context.Context, c peer.Call) (*wire.OutcomeResponse, error) {
	a.mu.Lock()
	t := a.targets[c.ID]
	a.mu.Unlock()
	if t != nil {
		id := t.d.identity()
		if id.PeerNode != c.Caller.Node || id.Namespace != c.Namespace || id.ClonePod != c.Pod {
			return nil, forbidden(c)
		}
		o, reason, text := t.outcome()
		return &wire.OutcomeResponse{Outcome: wire.Outcome(o), Reason: string(reason), Message: text}, nil
	}
	_, containers, err := a.cfg.Containers.Of(ctx, c.ID)
	if err != nil {
		return nil, wire.Errorf(wire.CodeUnavailable, "list the containers of the clone: %s", message(err))
	}
	if len(containers) > 0 {
		// Without a session they can only be those of a clone that has finished.
		return nil, wire.Errorf(wire.CodeUnavailable, "the clone has containers and no session; its condition tells what became of it")
	}
	return &wire.OutcomeResponse{Outcome: wire.OutcomeGone}, nil
}
