// Package guard stands between the kubelet and its container runtime and keeps
// the kubelet's hands off the containers of pods that are being moved.
//
// Three things must not happen to a pod in a migration although the kubelet would
// do them any time: the containers of a clone must not start cold, a frozen
// container must not be stopped, removed or entered, and nothing must be created
// beside it. All of them go through the CRI, so this one wrapper of the runtime
// service holds them. With no pod held every call passes through untouched.
//
// The tests run the wrapper over a recording runtime; that the kubelet really
// routes everything through it is shown by the end-to-end tests.
package guard

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubelettypes "k8s.io/kubelet/pkg/types"
)

// Hold says what the kubelet may not do to a pod.
type Hold struct {
	// WithholdStart lets StartContainer succeed without starting anything. The
	// containers stay CREATED until a restore fills them.
	WithholdStart bool
	// Refuse, if set, is why nothing is created in the pod and why nobody may
	// enter it with exec, attach or port-forward: a sentence for the user.
	Refuse string
	// BeforeStop, if set, is called before a container or the sandbox of the pod is
	// stopped or removed. It blocks until that is allowed, or returns an error to
	// forbid it. It is called without locks held and may change the hold.
	BeforeStop func(ctx context.Context) error
	// Started, if set, is told each container whose start was withheld.
	Started func(ctx context.Context, containerID string) error
}

// Guard knows the pods that are held. Its methods may be called concurrently.
type Guard struct {
	ready chan struct{}
	once  sync.Once

	mu sync.Mutex
	// holds by UID of the pod.
	holds map[string]Hold
	// UID of the pod by container or sandbox ID. Filled as IDs are asked for while
	// something is held; IDs are never reused.
	owners map[string]string
	// later has, by UID of the pod, what Later was given.
	later map[string][]func()
}

// New returns a guard that delays every dangerous call until Ready: after a
// restart of the kubelet nothing may touch a pod before the journal was read.
func New() *Guard {
	return &Guard{
		ready:  make(chan struct{}),
		holds:  make(map[string]Hold),
		owners: make(map[string]string),
		later:  make(map[string][]func()),
	}
}

// Ready ends the delay of New.
func (g *Guard) Ready() { g.once.Do(func() { close(g.ready) }) }

// Set holds a pod, in place of the hold it may have.
func (g *Guard) Set(podUID string, h Hold) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holds[podUID] = h
}

// Later runs f when a pod whose starts are withheld is admitted, and never if it is
// released. It returns false, and does nothing, for every other pod.
func (g *Guard) Later(podUID string, f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.holds[podUID].WithholdStart {
		return false
	}
	g.later[podUID] = append(g.later[podUID], f)
	return true
}

// Admit ends the hold of a pod whose containers run although their start was withheld.
func (g *Guard) Admit(podUID string) {
	g.mu.Lock()
	later := g.later[podUID]
	g.mu.Unlock()
	g.Release(podUID)
	for _, f := range later {
		f()
	}
}

// Release ends the hold of a pod. A pod that is not held is no error.
func (g *Guard) Release(podUID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.holds, podUID)
	delete(g.later, podUID)
	for id, uid := range g.owners {
		if uid == podUID {
			delete(g.owners, id)
		}
	}
}

// Held returns the hold of a pod.
func (g *Guard) Held(podUID string) (Hold, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h, ok := g.holds[podUID]
	return h, ok
}

// Wrap returns the runtime service that the kubelet gets in place of s.
func (g *Guard) Wrap(s internalapi.RuntimeService) internalapi.RuntimeService {
	return &runtimeService{RuntimeService: s, guard: g}
}

func (g *Guard) wait(ctx context.Context) error {
	select {
	case <-g.ready:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the migration journal: %w", ctx.Err())
	}
}

// owner returns the cached pod of an ID and whether any pod is held at all.
func (g *Guard) owner(id string) (uid string, known, any bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	uid, known = g.owners[id]
	return uid, known, len(g.holds) > 0
}

func (g *Guard) remember(id, uid string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, held := g.holds[uid]; held {
		g.owners[id] = uid
	}
}

type runtimeService struct {
	internalapi.RuntimeService
	guard *Guard
}

// hold finds the hold of the pod that owns an ID. lookup asks the runtime for the
// labels of the ID.
func (r *runtimeService) hold(ctx context.Context, id string, lookup func() (map[string]string, error)) (Hold, bool, error) {
	if err := r.guard.wait(ctx); err != nil {
		return Hold{}, false, err
	}
	uid, known, any := r.guard.owner(id)
	if !any {
		return Hold{}, false, nil
	}
	if !known {
		labels, err := lookup()
		if status.Code(err) == codes.NotFound {
			// The call itself will say so.
			return Hold{}, false, nil
		}
		if err != nil {
			return Hold{}, false, fmt.Errorf("find the pod of %s: %w", id, err)
		}
		uid = labels[kubelettypes.KubernetesPodUIDLabel]
		r.guard.remember(id, uid)
	}
	h, ok := r.guard.Held(uid)
	return h, ok, nil
}

func (r *runtimeService) holdOfContainer(ctx context.Context, id string) (Hold, bool, error) {
	return r.hold(ctx, id, func() (map[string]string, error) {
		resp, err := r.RuntimeService.ContainerStatus(ctx, id, false)
		return resp.GetStatus().GetLabels(), err
	})
}

func (r *runtimeService) holdOfSandbox(ctx context.Context, id string) (Hold, bool, error) {
	return r.hold(ctx, id, func() (map[string]string, error) {
		resp, err := r.RuntimeService.PodSandboxStatus(ctx, id, false)
		return resp.GetStatus().GetLabels(), err
	})
}

func refused(h Hold) error {
	return status.Error(codes.FailedPrecondition, h.Refuse)
}

func (r *runtimeService) CreateContainer(ctx context.Context, sandboxID string, config *runtimeapi.ContainerConfig, sandboxConfig *runtimeapi.PodSandboxConfig) (string, error) {
	if err := r.guard.wait(ctx); err != nil {
		return "", err
	}
	uid := sandboxConfig.GetMetadata().GetUid()
	if h, ok := r.guard.Held(uid); ok && h.Refuse != "" {
		return "", refused(h)
	}
	id, err := r.RuntimeService.CreateContainer(ctx, sandboxID, config, sandboxConfig)
	if err == nil {
		r.guard.remember(id, uid)
	}
	return id, err
}

func (r *runtimeService) StartContainer(ctx context.Context, id string) error {
	h, held, err := r.holdOfContainer(ctx, id)
	switch {
	case err != nil:
		return err
	case held && h.Refuse != "":
		return refused(h)
	case held && h.WithholdStart:
		if h.Started == nil {
			return nil
		}
		return h.Started(ctx, id)
	}
	return r.RuntimeService.StartContainer(ctx, id)
}

// allowStop asks the holder whether a container or sandbox may go.
func allowStop(ctx context.Context, h Hold, held bool, err error) error {
	if err != nil || !held || h.BeforeStop == nil {
		return err
	}
	return h.BeforeStop(ctx)
}

func (r *runtimeService) StopContainer(ctx context.Context, id string, timeout int64) error {
	h, held, err := r.holdOfContainer(ctx, id)
	if err := allowStop(ctx, h, held, err); err != nil {
		return err
	}
	return r.RuntimeService.StopContainer(ctx, id, timeout)
}

func (r *runtimeService) RemoveContainer(ctx context.Context, id string) error {
	h, held, err := r.holdOfContainer(ctx, id)
	if err := allowStop(ctx, h, held, err); err != nil {
		return err
	}
	return r.RuntimeService.RemoveContainer(ctx, id)
}

func (r *runtimeService) StopPodSandbox(ctx context.Context, id string) error {
	h, held, err := r.holdOfSandbox(ctx, id)
	if err := allowStop(ctx, h, held, err); err != nil {
		return err
	}
	return r.RuntimeService.StopPodSandbox(ctx, id)
}

func (r *runtimeService) RemovePodSandbox(ctx context.Context, id string) error {
	h, held, err := r.holdOfSandbox(ctx, id)
	if err := allowStop(ctx, h, held, err); err != nil {
		return err
	}
	return r.RuntimeService.RemovePodSandbox(ctx, id)
}

// enter refuses whoever wants into a held container.
func enter(h Hold, held bool, err error) error {
	if err != nil {
		return err
	}
	if held && h.Refuse != "" {
		return refused(h)
	}
	return nil
}

func (r *runtimeService) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (stdout, stderr []byte, err error) {
	h, held, err := r.holdOfContainer(ctx, id)
	if err := enter(h, held, err); err != nil {
		return nil, nil, err
	}
	return r.RuntimeService.ExecSync(ctx, id, cmd, timeout)
}

func (r *runtimeService) Exec(ctx context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	h, held, err := r.holdOfContainer(ctx, req.GetContainerId())
	if err := enter(h, held, err); err != nil {
		return nil, err
	}
	return r.RuntimeService.Exec(ctx, req)
}

func (r *runtimeService) Attach(ctx context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	h, held, err := r.holdOfContainer(ctx, req.GetContainerId())
	if err := enter(h, held, err); err != nil {
		return nil, err
	}
	return r.RuntimeService.Attach(ctx, req)
}

func (r *runtimeService) PortForward(ctx context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	h, held, err := r.holdOfSandbox(ctx, req.GetPodSandboxId())
	if err := enter(h, held, err); err != nil {
		return nil, err
	}
	return r.RuntimeService.PortForward(ctx, req)
}
