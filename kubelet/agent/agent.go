package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/compare"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
)

// Peer is the kubelet of another node; see Remote.
type Peer interface {
	Open(ctx context.Context, s wire.Session, r *wire.OpenRequest) (*wire.OpenResponse, error)
	// Stream returns the checkpoint. Read returns io.EOF only after all of it arrived.
	Stream(ctx context.Context, s wire.Session) (io.ReadCloser, error)
	Freeze(ctx context.Context, s wire.Session, r *wire.FreezeRequest) (*wire.FreezeResponse, error)
	Commit(ctx context.Context, s wire.Session, r *wire.CommitRequest) (*wire.CommitResponse, error)
	Done(ctx context.Context, s wire.Session, r *wire.DoneRequest) error
	Failed(ctx context.Context, s wire.Session, r *wire.FailureRequest) error
	Abort(ctx context.Context, s wire.Session, r *wire.FailureRequest) error
	Outcome(ctx context.Context, s wire.Session) (*wire.OutcomeResponse, error)
	Close()
}

// Remote is a Peer over the network.
type Remote struct{ *peer.Client }

// Stream implements Peer.
func (r Remote) Stream(ctx context.Context, s wire.Session) (io.ReadCloser, error) {
	return r.Client.Stream(ctx, s)
}

// Config has everything an agent needs.
type Config struct {
	Node       Node
	API        API
	Containers Containers
	Runtime    cri.MigrationServiceClient
	// Checkpointer is the same runtime.
	Checkpointer Checkpointer
	Journal      Journal
	Guard        *guard.Guard
	// Dial connects to the kubelet of a node at HOST:PORT and proves that it is that
	// node.
	Dial func(node, address string) (Peer, error)
	// DialStream connects to a stream address of the runtime.
	DialStream func(ctx context.Context, address string) (StreamConn, error)
	Metrics    *Metrics
	Deadlines  migration.Deadlines
	// Draining is set where migrations are switched off: what the journal knows is brought
	// to its end, and nothing new begins.
	Draining bool
	// Point, if set, is called by the loops before each effect with the name of the
	// effect, for example "source.freeze" or "target.call-commit". Tests use it to stop
	// a migration at a place of their choice; see kubelet/inject.
	Point func(name string)
}

// Agent moves the pods of one node. Its methods may be called concurrently.
type Agent struct {
	cfg Config
	ctx context.Context
	// close ends ctx.
	close context.CancelFunc

	mu      sync.Mutex
	sources map[string]*source // by session
	// pods has the session of each source pod, by UID: one at a time.
	pods map[string]string
	// takings has the pods of which a checkpoint is being written, by UID. A pod is never
	// here and in pods.
	takings map[string]*taking
	targets map[string]*target // by session, which is the UID of the clone
	// cloned has the clones that run, until the API server's copy of them says so.
	cloned map[string]bool
	// suspended has the pods whose probes are suspended.
	suspended map[string]bool
	// resumed has the clones whose migration a restarted kubelet took up.
	resumed map[string]bool
	wg      sync.WaitGroup
}

// New returns an agent. Recover has to be called before anything else.
func New(ctx context.Context, cfg Config) *Agent {
	ctx, cancel := context.WithCancel(ctx)
	return &Agent{
		cfg: cfg, ctx: ctx, close: cancel,
		sources:   make(map[string]*source),
		pods:      make(map[string]string),
		takings:   make(map[string]*taking),
		targets:   make(map[string]*target),
		cloned:    make(map[string]bool),
		suspended: make(map[string]bool),
		resumed:   make(map[string]bool),
	}
}

// Recover continues the migrations that the journal knows and then lets the
// kubelet touch pods. A journal that cannot be read completely is an error: going
// on without a record could run a pod twice.
func (a *Agent) Recover() error {
	records, err := a.cfg.Journal.List()
	if err != nil {
		return fmt.Errorf("read the migration journal; repair or, when no pod of it runs on either node, move away the named file: %w", err)
	}
	for _, r := range records {
		switch r.Side {
		case migration.SideSource:
			m, err := migration.LoadSource(r, a.cfg.Deadlines)
			if err != nil {
				return fmt.Errorf("session %s: %w", r.Identity.Session, err)
			}
			s := a.addSource(m)
			// The engine says so, too, but a moment later, and the kubelet must not touch
			// the pod in between.
			s.guardPod()
			a.suspendProbes(r.Identity.SourceUID, true)
			s.d.post(migration.Restarted{})
		case migration.SideTarget:
			m, err := migration.LoadTarget(r, a.cfg.Deadlines)
			if err != nil {
				return fmt.Errorf("session %s: %w", r.Identity.Session, err)
			}
			a.mu.Lock()
			a.resumed[r.Identity.Session] = true
			a.mu.Unlock()
			a.addTarget(m).d.post(migration.Restarted{})
		}
	}
	a.cfg.Guard.Ready()
	return nil
}

// Knows tells whether a clone has a migration on this node, running or over.
func (a *Agent) Knows(cloneUID string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.targets[cloneUID] != nil
}

// Close ends every goroutine of the agent. Migrations that run go on from the
// journal after the next start.
func (a *Agent) Close() {
	a.close()
	a.wg.Wait()
}

// ProbesSuspended tells whether the probes of a pod are to be left out.
func (a *Agent) ProbesSuspended(podUID string) bool {
	a.mu.Lock()
	suspended, resumed := a.suspended[podUID], a.resumed[podUID]
	a.mu.Unlock()
	if suspended || !resumed {
		return suspended
	}
	// A restarted kubelet knows containers of the clone from before their restore. Its
	// probes take a container that does not run for one that has failed, so they wait
	// until the restored ones are seen.
	if pod, ok := a.cfg.Node.Pod(podUID); ok && waiting(pod) {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.resumed, podUID)
	return false
}

// waiting tells whether a moving container of a pod has not been seen running.
func waiting(pod *v1.Pod) bool {
	statuses := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses)
	for _, c := range compare.Moving(&pod.Spec) {
		i := slices.IndexFunc(statuses, func(s v1.ContainerStatus) bool { return s.Name == c.Name })
		if i >= 0 && statuses[i].State.Running == nil && statuses[i].State.Terminated == nil {
			return true
		}
	}
	return false
}

func (a *Agent) suspendProbes(podUID string, suspend bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if suspend {
		a.suspended[podUID] = true
	} else {
		delete(a.suspended, podUID)
	}
}

// RefuseKill returns why the kubelet may not kill a pod on its own account now.
func (a *Agent) RefuseKill(podUID string) error {
	a.mu.Lock()
	s := a.sources[a.pods[podUID]]
	a.mu.Unlock()
	if s == nil || !s.guarded() {
		return nil
	}
	return fmt.Errorf("pod is frozen for its migration to node %s", s.d.identity().PeerNode)
}

// run starts the loop of a driver and calls after when it has ended.
func (a *Agent) run(d *driver, after func()) {
	a.wg.Add(1)
	go func() {
		defer a.wg.Done()
		d.run()
		if a.ctx.Err() == nil {
			after()
		}
	}()
}

// peer connects to the kubelet of the other side. Once the pods of a migration have
// ended, the API server tells a node nothing of the other any more; what is left to be
// said goes to where its kubelet was.
func (a *Agent) peer(ctx context.Context, id migration.Identity) (Peer, error) {
	address, err := a.cfg.API.Kubelet(ctx, id.PeerNode)
	if err != nil {
		if id.PeerAddress == "" {
			return nil, fmt.Errorf("find the kubelet of node %s: %w", id.PeerNode, err)
		}
		address = id.PeerAddress
	}
	return a.cfg.Dial(id.PeerNode, address)
}

// locate notes where the kubelet of the other side is.
func (a *Agent) locate(ctx context.Context, id migration.Identity) migration.Identity {
	address, err := a.cfg.API.Kubelet(ctx, id.PeerNode)
	if err != nil {
		// It is looked for again when it is needed.
		klog.FromContext(ctx).V(2).Info("Kubelet of the other side not found yet", "node", id.PeerNode, "err", err)
	}
	id.PeerAddress = address
	return id
}

// session is the name of a migration on the wire.
func session(id migration.Identity) wire.Session {
	return wire.Session{Namespace: id.Namespace, Pod: id.SourcePod, ID: id.Session}
}

// conditionCloned is the condition of a clone that walks through its states.
const conditionCloned = v1.PodConditionType(v1alpha1.ConditionCloned)

// IsCloned tells whether a pod has taken over its source, by its own status.
func IsCloned(pod *v1.Pod) bool {
	i := slices.IndexFunc(pod.Status.Conditions, func(c v1.PodCondition) bool { return c.Type == conditionCloned })
	return i >= 0 && pod.Status.Conditions[i].Status == v1.ConditionTrue
}

// failed tells whether a clone will never run, by its own status.
func failed(pod *v1.Pod) bool {
	i := slices.IndexFunc(pod.Status.Conditions, func(c v1.PodCondition) bool { return c.Type == conditionCloned })
	return i >= 0 && pod.Status.Conditions[i].Status == v1.ConditionFalse
}

// runtimeTimeout bounds calls to the runtime and the API server that are short. What
// does not answer in time is asked again.
const runtimeTimeout = time.Minute

// ErrClosed is returned while the kubelet shuts down.
var ErrClosed = errors.New("the kubelet shuts down; the migration goes on after its next start")

// retry calls f until it succeeds, with growing pauses, at most until ctx ends.
func retry(ctx context.Context, f func(context.Context) error) error {
	pause := 100 * time.Millisecond
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		klog.FromContext(ctx).V(2).Info("Retrying", "err", err, "pause", pause)
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
		pause = min(2*pause, 5*time.Second)
	}
}
