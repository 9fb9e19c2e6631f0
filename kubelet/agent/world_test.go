package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/cri-api/migration/migrationtest"
	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/journal"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
)

// cloneOf stands for spec.clonePod, which upstream's API types lack.
const cloneOf = "test/clonePod"

// world is two nodes, an API server and the network between them.
type world struct {
	// hidden nodes may not be read.
	hidden atomic.Bool
	t      *testing.T
	nodes  map[string]*testNode

	// forbidden, if set, tells whether the API server forbids to read a pod.
	forbidden func(name string) bool

	mu   sync.Mutex
	pods map[string]*v1.Pod // by name
	// cut makes every call between the nodes fail after it was carried out.
	cut func(verb wire.Verb) (lost bool)
}

// testNode is one node: its fake runtime outlives the agent, as containerd outlives a
// kubelet.
type testNode struct {
	w       *world
	name    string
	runtime *migrationtest.Runtime
	client  cri.MigrationServiceClient
	dir     string
	// memory is what a new pod could use.
	memory uint64
	// draining makes the next start one with migrations switched off.
	draining bool

	mu         sync.Mutex
	agent      *Agent
	guard      *guard.Guard
	containers map[string][]Container // by UID of the pod
	terminated map[string]bool
	events     []string
	point      func(string)
	// checkpoint is what the runtime does with a whole pod.
	checkpoint func(context.Context, *runtimeapi.CheckpointPodRequest) error
}

var deadlines = migration.Deadlines{
	Idle: 5 * time.Second, Prepare: 5 * time.Second, Stream: 5 * time.Second, Freeze: 5 * time.Second,
	Commit: time.Second, Restore: 5 * time.Second, Outcome: time.Second, Abort: time.Second,
	Retry: 10 * time.Millisecond, RetryMax: 50 * time.Millisecond,
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, nodes: make(map[string]*testNode), pods: make(map[string]*v1.Pod)}
	for _, name := range []string{"a", "b"} {
		// Socket paths are short: the test's own folder may be too long for them.
		n := &testNode{
			w: w, name: name, runtime: migrationtest.New(t.TempDir()), dir: t.TempDir(), memory: 1 << 40,
			containers: make(map[string][]Container), terminated: make(map[string]bool),
		}
		l := bufconn.Listen(1 << 20)
		s := grpc.NewServer()
		cri.RegisterMigrationServiceServer(s, n.runtime)
		go func() { _ = s.Serve(l) }()
		conn, err := grpc.NewClient("passthrough:///runtime", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		n.client = cri.NewMigrationServiceClient(conn)
		t.Cleanup(func() { conn.Close(); s.Stop() })
		w.nodes[name] = n
		n.start()
		t.Cleanup(func() { n.stop() })
	}
	return w
}

// start runs an agent on the node, as a kubelet does when it starts.
func (n *testNode) start() {
	j, err := journal.Open(filepath.Join(n.dir, "journal"))
	if err != nil {
		n.w.t.Fatal(err)
	}
	g := guard.New()
	a := New(context.Background(), Config{
		Node: n, API: n.w, Containers: n, Runtime: n.client, Checkpointer: n, Journal: j, Guard: g,
		Metrics: NewMetrics(), Deadlines: deadlines, DialStream: DialStream, Draining: n.draining,
		Dial: func(node, address string) (Peer, error) {
			if address != node+":10250" {
				return nil, fmt.Errorf("node %s has no address %q", node, address)
			}
			return &link{w: n.w, from: n.name, to: n.w.nodes[node]}, nil
		},
		Point: func(name string) {
			n.mu.Lock()
			p := n.point
			n.mu.Unlock()
			if p != nil {
				p(name)
			}
		},
	})
	n.mu.Lock()
	n.agent, n.guard = a, g
	n.mu.Unlock()
	if err := a.Recover(); err != nil {
		n.w.t.Fatal(err)
	}
}

// pair makes a running source on node a and its clone on node b, of which at most one
// may run from now on.
func (w *world) pair() *v1.Pod {
	w.running("source")
	clone := w.put("clone", "b", "source")
	w.atMostOne("source", "clone")
	return clone
}

// crash lets a clone take over its source and the agent of a node go down at a point, as
// in a crash. changed is called before it comes back. The error is that of the last
// synchronisation of the clone.
func (w *world) crash(t *testing.T, node, point string, clone *v1.Pod, changed func(*testNode)) error {
	t.Helper()
	n := w.nodes[node]
	down := make(chan struct{})
	n.at(point, func() {
		// The loop goes no further than this point.
		n.current().close()
		close(down)
	})
	done := make(chan error, 1)
	go func() { done <- w.sync(t.Context(), clone) }()
	<-down
	n.stop()
	changed(n)
	n.start()
	err := <-done
	if node == clone.Spec.NodeName {
		if !n.current().Knows(string(clone.UID)) {
			t.Error("the node has forgotten the clone")
		}
		// The new kubelet synchronises its pods again.
		err = w.sync(t.Context(), clone)
	}
	return err
}

func (n *testNode) stop() { n.current().Close() }

func (n *testNode) current() *Agent {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.agent
}

// at calls f once when the node's agent comes to a point.
func (n *testNode) at(point string, f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.point = func(name string) {
		if name != point {
			return
		}
		n.mu.Lock()
		n.point = nil
		n.mu.Unlock()
		f()
	}
}

// The node as the agent sees it.

func (n *testNode) Name() string                { return n.name }
func (n *testNode) ClonePod(pod *v1.Pod) string { return pod.Annotations[cloneOf] }
func (n *testNode) Pod(uid string) (*v1.Pod, bool) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	for _, p := range n.w.pods {
		if string(p.UID) == uid && p.Spec.NodeName == n.name {
			return p.DeepCopy(), true
		}
	}
	return nil, false
}
func (n *testNode) PodByName(_, name string) (*v1.Pod, bool) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	p, ok := n.w.pods[name]
	if !ok || p.Spec.NodeName != n.name {
		return nil, false
	}
	return p.DeepCopy(), true
}
func (n *testNode) AddedPrivileges(_, _ *v1.Pod) []string { return nil }
func (n *testNode) Terminate(_ context.Context, pod *v1.Pod, _ func(*v1.PodStatus)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.terminated[pod.Name] = true
}
func (n *testNode) Event(_ context.Context, pod *v1.Pod, _ bool, reason, message string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, fmt.Sprintf("%s %s: %s", pod.Name, reason, message))
}
func (n *testNode) EmptyDir(podUID, volume string) string {
	return filepath.Join(n.dir, podUID, volume)
}
func (n *testNode) LogDirectory(pod *v1.Pod, container string) string {
	return filepath.Join(n.dir, "log", string(pod.UID), container)
}
func (n *testNode) MemoryAvailable() uint64 { return n.memory }

// The runtime as the kubelet sees it.

func (n *testNode) Of(_ context.Context, podUID string) (string, []Container, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	cs := slices.Clone(n.containers[podUID])
	for i := range cs {
		s := n.runtime.State(cs[i].ID)
		cs[i].Created, cs[i].Running = s == migrationtest.Created, s == migrationtest.Running
	}
	return "sandbox-" + podUID, cs, nil
}
func (n *testNode) CheckpointPod(ctx context.Context, r *runtimeapi.CheckpointPodRequest) error {
	return n.checkpoint(ctx, r)
}
func (n *testNode) LogPath(context.Context, string) (string, error) { return "", nil }
func (n *testNode) Stop(_ context.Context, id string) error {
	n.runtime.Remove(id)
	return nil
}

// add makes the container of a pod.
func (n *testNode) add(pod *v1.Pod, state migrationtest.State) {
	n.mu.Lock()
	defer n.mu.Unlock()
	uid := string(pod.UID)
	id := n.runtime.Add("sandbox-"+uid, "main", state)
	n.containers[uid] = []Container{{Name: "main", ID: id}}
}

func (n *testNode) id(pod string) string {
	n.w.mu.Lock()
	uid := string(n.w.pods[pod].UID)
	n.w.mu.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.containers[uid]) == 0 {
		return ""
	}
	return n.containers[uid][0].ID
}

// The API server.

func (w *world) Kubelet(_ context.Context, node string) (string, error) {
	if w.hidden.Load() {
		return "", apierrors.NewForbidden(v1.Resource("nodes"), node, errors.New("no relationship found"))
	}
	return node + ":10250", nil
}

func (w *world) Fenced(context.Context, string) (bool, error) { return false, nil }

func (w *world) Pod(_ context.Context, _, name string) (*v1.Pod, error) {
	if w.forbidden != nil && w.forbidden(name) {
		return nil, apierrors.NewForbidden(v1.Resource("pods"), name, errors.New("no relationship found"))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.pods[name]
	if !ok {
		return nil, apierrors.NewNotFound(v1.Resource("pods"), name)
	}
	return p.DeepCopy(), nil
}

func (w *world) PatchStatus(_ context.Context, _, name, uid string, change func(*v1.PodStatus)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.pods[name]
	if !ok || string(p.UID) != uid {
		return apierrors.NewNotFound(v1.Resource("pods"), name)
	}
	p = p.DeepCopy()
	change(&p.Status)
	w.pods[name] = p
	return nil
}

// put makes a pod that is bound to a node.
func (w *world) put(name, node, source string) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "ns", UID: types.UID("uid-of-pod-" + name)},
		Spec: v1.PodSpec{
			NodeName:   node,
			Containers: []v1.Container{{Name: "main", Image: "image:1"}},
		},
		Status: v1.PodStatus{Phase: v1.PodPending},
	}
	if source != "" {
		p.Annotations = map[string]string{cloneOf: source}
	}
	w.mu.Lock()
	w.pods[name] = p
	w.mu.Unlock()
	return p.DeepCopy()
}

// running makes a pod that runs on node a.
func (w *world) running(name string) {
	p := w.put(name, "a", "")
	w.nodes["a"].add(p, migrationtest.Running)
	w.mu.Lock()
	w.pods[name].Status = v1.PodStatus{
		Phase:             v1.PodRunning,
		ContainerStatuses: []v1.ContainerStatus{{Name: "main", State: v1.ContainerState{Running: &v1.ContainerStateRunning{}}}},
	}
	w.mu.Unlock()
}

func (w *world) status(name string) v1.PodStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	return *w.pods[name].Status.DeepCopy()
}

func (w *world) cloned(name string) (v1.ConditionStatus, string, string) {
	for _, c := range w.status(name).Conditions {
		if c.Type == conditionCloned {
			return c.Status, c.Reason, c.Message
		}
	}
	return "", "", ""
}

// sync is what the kubelet of node b does with a clone: again and again until the pod
// is done or the kubelet stops.
func (w *world) sync(ctx context.Context, pod *v1.Pod) error {
	n := w.nodes["b"]
	return n.current().Sync(ctx, pod, func(shell *v1.Pod) error {
		n.add(shell, migrationtest.Created)
		return nil
	})
}

// link is the way from one kubelet to another.
type link struct {
	w    *world
	from string
	to   *testNode
}

var errLost = errors.New("the connection broke")

// pass carries a call out and loses the answer if the world is cut.
func pass[A any](ctx context.Context, l *link, v wire.Verb, s wire.Session, f func(*Agent, peer.Call) (A, error)) (A, error) {
	var none A
	a, err := f(l.to.current(), peer.Call{Session: s, Verb: v, Caller: peer.Caller{User: "system:node:" + l.from, Node: l.from}})
	l.w.mu.Lock()
	cut := l.w.cut
	l.w.mu.Unlock()
	if cut != nil && cut(v) {
		return none, errLost
	}
	return a, err
}

func (l *link) Open(ctx context.Context, s wire.Session, r *wire.OpenRequest) (*wire.OpenResponse, error) {
	return pass(ctx, l, wire.VerbOpen, s, func(a *Agent, c peer.Call) (*wire.OpenResponse, error) { return a.Open(ctx, c, r) })
}
func (l *link) Freeze(ctx context.Context, s wire.Session, r *wire.FreezeRequest) (*wire.FreezeResponse, error) {
	return pass(ctx, l, wire.VerbFreeze, s, func(a *Agent, c peer.Call) (*wire.FreezeResponse, error) { return a.Freeze(ctx, c, r) })
}
func (l *link) Commit(ctx context.Context, s wire.Session, r *wire.CommitRequest) (*wire.CommitResponse, error) {
	return pass(ctx, l, wire.VerbCommit, s, func(a *Agent, c peer.Call) (*wire.CommitResponse, error) { return a.Commit(ctx, c, r) })
}
func (l *link) Outcome(ctx context.Context, s wire.Session) (*wire.OutcomeResponse, error) {
	return pass(ctx, l, wire.VerbOutcome, s, func(a *Agent, c peer.Call) (*wire.OutcomeResponse, error) { return a.Outcome(ctx, c) })
}

func nothing(err error) (struct{}, error) { return struct{}{}, err }

func (l *link) Done(ctx context.Context, s wire.Session, r *wire.DoneRequest) error {
	_, err := pass(ctx, l, wire.VerbDone, s, func(a *Agent, c peer.Call) (struct{}, error) { return nothing(a.Done(ctx, c, r)) })
	return err
}
func (l *link) Failed(ctx context.Context, s wire.Session, r *wire.FailureRequest) error {
	_, err := pass(ctx, l, wire.VerbFailed, s, func(a *Agent, c peer.Call) (struct{}, error) { return nothing(a.Failed(ctx, c, r)) })
	return err
}
func (l *link) Abort(ctx context.Context, s wire.Session, r *wire.FailureRequest) error {
	_, err := pass(ctx, l, wire.VerbAbort, s, func(a *Agent, c peer.Call) (struct{}, error) { return nothing(a.Abort(ctx, c, r)) })
	return err
}
func (l *link) Close() {}

// body counts what is read and tells the sender at the end, as the server does.
type body struct {
	*peer.Stream
	once sync.Once

	// A stream that is cut is closed while it is read.
	mu  sync.Mutex
	n   uint64
	end error
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.Stream.Body.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n += uint64(n)
	if err != nil {
		b.end = err
	}
	return n, err
}

func (b *body) Close() error {
	err := b.Stream.Body.Close()
	b.once.Do(func() {
		b.mu.Lock()
		n, end := b.n, b.end
		b.mu.Unlock()
		if end == io.EOF {
			b.Sent(n, nil)
		} else {
			b.Sent(n, errLost)
		}
	})
	return err
}

func (l *link) Stream(ctx context.Context, s wire.Session) (io.ReadCloser, error) {
	return pass(ctx, l, wire.VerbStream, s, func(a *Agent, c peer.Call) (io.ReadCloser, error) {
		st, err := a.Stream(ctx, c)
		if err != nil {
			return nil, err
		}
		return &body{Stream: st}, nil
	})
}
