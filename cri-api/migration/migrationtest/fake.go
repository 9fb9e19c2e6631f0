package migrationtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// Runtime is a fake runtime. Its containers count milliseconds while they run.
// Create it with New.
type Runtime struct {
	migration.UnimplementedMigrationServiceServer

	// Fail, when set, is asked before every call with the method's name and the
	// session; what it returns is the answer. It may block.
	Fail func(ctx context.Context, method, session string) error
	// FeaturesReply and Findings are the answers of Features and PreflightPod.
	FeaturesReply *migration.FeaturesResponse
	Findings      []*migration.Finding

	dir string

	mu          sync.Mutex
	containers  map[string]*fakeContainer
	checkpoints map[string]*fakeCheckpoint
	restores    map[string]*fakeRestore
	next        int
}

type fakeContainer struct {
	id, name, sandbox string
	state             State
	frozen            bool
	// count is what had been counted when the container last began to run.
	count int64
	since time.Time
}

func (c *fakeContainer) now() int64 {
	if c.state != Running || c.frozen {
		return c.count
	}
	return c.count + time.Since(c.since).Milliseconds()
}

func (c *fakeContainer) freeze() {
	c.count, c.frozen = c.now(), true
}

func (c *fakeContainer) thaw() {
	if c.frozen {
		c.frozen, c.since = false, time.Now()
	}
}

type fakeCheckpoint struct {
	request  []byte
	ids      []string
	names    []string
	address  string
	listener net.Listener
	ready    chan net.Conn
	phase    string
	ctx      context.Context
	cancel   context.CancelFunc
	busy     sync.Mutex
}

type fakeRestore struct {
	request  []byte
	targets  []*migration.RestoreTarget
	address  string
	listener net.Listener
	cancel   context.CancelFunc
	done     chan struct{}
	err      error
	bytes    int
	digest   string
	counts   map[string]int64
	restored map[string]bool
}

// New returns a fake runtime whose sockets are in a directory.
func New(dir string) *Runtime {
	return &Runtime{
		dir:         dir,
		containers:  map[string]*fakeContainer{},
		checkpoints: map[string]*fakeCheckpoint{},
		restores:    map[string]*fakeRestore{},
		FeaturesReply: &migration.FeaturesResponse{
			StreamVersions: []uint32{1}, RuntimeName: "fake", RuntimeVersion: "1", OciRuntimeName: "fake", OciRuntimeVersion: "1",
			CriuVersion: "0", KernelRelease: "0", Architecture: "amd64", CpuFeatures: []string{"fpu"},
			Kernel: &migration.KernelFeatures{LazyPages: true}, CgroupMode: "v2",
		},
	}
}

// Add makes a container and returns its ID.
func (r *Runtime) Add(sandbox, name string, state State) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next++
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", r.dir, r.next))
	id := hex.EncodeToString(sum[:])
	r.containers[id] = &fakeContainer{id: id, name: name, sandbox: sandbox, state: state, since: time.Now()}
	return id
}

// Remove forgets a container.
func (r *Runtime) Remove(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.containers, id)
}

// State returns the CRI state of a container, empty when there is none.
func (r *Runtime) State(id string) State {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.containers[id]; c != nil {
		return c.state
	}
	return ""
}

// Frozen tells whether a container is frozen.
func (r *Runtime) Frozen(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	return c != nil && c.frozen
}

// Active tells whether the processes of a container run: neither frozen nor ended.
func (r *Runtime) Active(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	return c != nil && c.state == Running && !c.frozen
}

// Count returns how far a container has counted. A container that does not run
// does not answer.
func (r *Runtime) Count(id string) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil || c.state != Running || c.frozen {
		return 0, errors.New("the container does not answer")
	}
	return int(c.now()), nil
}

// Sessions returns the number of open sessions of both sides.
func (r *Runtime) Sessions() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.checkpoints) + len(r.restores)
}

func (r *Runtime) fail(ctx context.Context, method, session string) error {
	if r.Fail == nil {
		return nil
	}
	return r.Fail(ctx, method, session)
}

// Features implements migration.MigrationServiceServer.
func (r *Runtime) Features(ctx context.Context, _ *migration.FeaturesRequest) (*migration.FeaturesResponse, error) {
	if err := r.fail(ctx, "Features", ""); err != nil {
		return nil, err
	}
	return proto.Clone(r.FeaturesReply).(*migration.FeaturesResponse), nil
}

// PreflightPod implements migration.MigrationServiceServer.
func (r *Runtime) PreflightPod(ctx context.Context, q *migration.PreflightPodRequest) (*migration.PreflightPodResponse, error) {
	if err := r.fail(ctx, "PreflightPod", ""); err != nil {
		return nil, err
	}
	if len(q.Options) != 0 {
		return nil, status.Error(codes.InvalidArgument, "unknown option")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.find(q.PodSandboxId, q.ContainerIds, Running); err != nil {
		return nil, err
	}
	return &migration.PreflightPodResponse{Findings: r.Findings, MemoryBytes: uint64(len(q.ContainerIds)) << 20, RootfsBytes: 4096}, nil
}

// find looks containers up; r.mu is held.
func (r *Runtime) find(sandbox string, ids []string, want State) ([]*fakeContainer, error) {
	if len(ids) == 0 {
		return nil, status.Error(codes.InvalidArgument, "no containers are named")
	}
	var out []*fakeContainer
	for i, id := range ids {
		if slices.Contains(ids[:i], id) {
			return nil, status.Error(codes.InvalidArgument, "a container is named twice")
		}
		c := r.containers[id]
		if c == nil {
			return nil, status.Errorf(codes.NotFound, "no container %s", id)
		}
		if c.sandbox != sandbox {
			return nil, status.Errorf(codes.InvalidArgument, "container %s belongs to another sandbox", id)
		}
		if c.state != want {
			return nil, status.Errorf(codes.FailedPrecondition, "container %s is %s, not %s", id, c.state, want)
		}
		out = append(out, c)
	}
	return out, nil
}

func checkRequest(session string, version uint32, options map[string]string, volumes []*migration.Volume) error {
	if session == "" || version != 1 || len(options) != 0 {
		return status.Error(codes.InvalidArgument, "no session, another version than 1, or an unknown option")
	}
	for _, v := range volumes {
		if !filepath.IsAbs(v.HostPath) {
			return status.Errorf(codes.InvalidArgument, "volume %s has no absolute path", v.Name)
		}
	}
	return nil
}

func (r *Runtime) listen(side, session string) (net.Listener, string, error) {
	sum := sha256.Sum256([]byte(session))
	dir := filepath.Join(r.dir, side+hex.EncodeToString(sum[:6]))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, "", err
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, "", err
	}
	return l, "unix://" + path, os.Chmod(path, 0o600)
}

func marshal(m proto.Message) []byte {
	b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return b
}

// PrepareCheckpoint implements migration.MigrationServiceServer.
func (r *Runtime) PrepareCheckpoint(ctx context.Context, q *migration.PrepareCheckpointRequest) (*migration.PrepareCheckpointResponse, error) {
	if err := r.fail(ctx, "PrepareCheckpoint", q.SessionId); err != nil {
		return nil, err
	}
	if err := checkRequest(q.SessionId, q.StreamVersion, q.Options, q.Volumes); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.checkpoints[q.SessionId]; old != nil {
		if string(old.request) != string(marshal(q)) {
			return nil, status.Error(codes.AlreadyExists, "the session was prepared with other arguments")
		}
		return &migration.PrepareCheckpointResponse{StreamAddress: old.address}, nil
	}
	c := &fakeCheckpoint{request: marshal(q), ready: make(chan net.Conn, 1), phase: "prepared"}
	for _, x := range q.Containers {
		c.ids, c.names = append(c.ids, x.ContainerId), append(c.names, x.Name)
	}
	if _, err := r.find(q.PodSandboxId, c.ids, Running); err != nil {
		return nil, err
	}
	l, address, err := r.listen("c", q.SessionId)
	if err != nil {
		return nil, err
	}
	c.listener, c.address = l, address
	c.ctx, c.cancel = context.WithCancel(context.Background())
	go func() {
		conn, err := l.Accept()
		l.Close()
		if err == nil {
			// The only round before the freeze.
			_, _ = conn.Write([]byte{migration.StreamReady})
			c.ready <- conn
		}
	}()
	r.checkpoints[q.SessionId] = c
	return &migration.PrepareCheckpointResponse{StreamAddress: address}, nil
}

// fakeState is the whole stream after its first byte: a JSON value and its SHA-256.
type fakeState struct {
	Session string
	Counts  map[string]int64
}

// FreezeCheckpoint implements migration.MigrationServiceServer.
func (r *Runtime) FreezeCheckpoint(ctx context.Context, q *migration.FreezeCheckpointRequest) (*migration.FreezeCheckpointResponse, error) {
	if err := r.fail(ctx, "FreezeCheckpoint", q.SessionId); err != nil {
		return nil, err
	}
	r.mu.Lock()
	c := r.checkpoints[q.SessionId]
	r.mu.Unlock()
	if c == nil {
		return nil, status.Errorf(codes.NotFound, "no checkpoint session %q", q.SessionId)
	}
	c.busy.Lock()
	defer c.busy.Unlock()
	if c.phase != "prepared" {
		return nil, status.Errorf(codes.FailedPrecondition, "the session is %s", c.phase)
	}
	var conn net.Conn
	select {
	case conn = <-c.ready:
	case <-time.After(200 * time.Millisecond):
		return nil, status.Error(codes.FailedPrecondition, "nobody reads the stream")
	}
	defer conn.Close()
	defer context.AfterFunc(c.ctx, func() { conn.Close() })()
	c.phase = "failed"
	start := time.Now()
	st := fakeState{Session: q.SessionId, Counts: map[string]int64{}}
	r.mu.Lock()
	for i, id := range c.ids {
		if x := r.containers[id]; x != nil {
			x.freeze()
			st.Counts[c.names[i]] = x.count
		}
	}
	r.mu.Unlock()
	if err := r.fail(ctx, "stream", q.SessionId); err != nil {
		return nil, err
	}
	b, _ := json.Marshal(st)
	sum := sha256.Sum256(b)
	b = append(b, sum[:]...)
	if _, err := conn.Write(b); err != nil {
		if c.ctx.Err() != nil {
			return nil, status.Error(codes.Aborted, "the session was finished")
		}
		return nil, status.Error(codes.Unknown, err.Error())
	}
	c.phase = "sent"
	return &migration.FreezeCheckpointResponse{FrozenAt: start.UnixNano(), StreamBytes: uint64(len(b)) + 1, FinalBytes: uint64(len(b)), FreezeDuration: 1, DumpDuration: int64(time.Since(start))}, nil
}

// FinishCheckpoint implements migration.MigrationServiceServer.
func (r *Runtime) FinishCheckpoint(ctx context.Context, q *migration.FinishCheckpointRequest) (*migration.FinishCheckpointResponse, error) {
	if err := r.fail(ctx, "FinishCheckpoint", q.SessionId); err != nil {
		return nil, err
	}
	if q.Outcome == migration.Outcome_OUTCOME_UNSPECIFIED {
		return nil, status.Error(codes.InvalidArgument, "an outcome is needed")
	}
	r.mu.Lock()
	c := r.checkpoints[q.SessionId]
	r.mu.Unlock()
	ids := q.ContainerIds
	if c != nil {
		ids = c.ids
		c.cancel()
		c.listener.Close()
		c.busy.Lock()
		defer c.busy.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range ids {
		x := r.containers[id]
		switch {
		case x == nil:
		case q.Outcome == migration.Outcome_OUTCOME_RESUME:
			x.thaw()
		case x.state == Running:
			x.count, x.state, x.frozen = x.now(), Exited, false
		}
	}
	delete(r.checkpoints, q.SessionId)
	return &migration.FinishCheckpointResponse{}, nil
}

// PrepareRestore implements migration.MigrationServiceServer.
func (r *Runtime) PrepareRestore(ctx context.Context, q *migration.PrepareRestoreRequest) (*migration.PrepareRestoreResponse, error) {
	if err := r.fail(ctx, "PrepareRestore", q.SessionId); err != nil {
		return nil, err
	}
	if err := checkRequest(q.SessionId, q.StreamVersion, q.Options, q.Volumes); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.restores[q.SessionId]; old != nil {
		if string(old.request) != string(marshal(q)) {
			return nil, status.Error(codes.AlreadyExists, "the session was prepared with other arguments")
		}
		return &migration.PrepareRestoreResponse{StreamAddress: old.address}, nil
	}
	var ids []string
	for _, x := range q.Containers {
		ids = append(ids, x.ContainerId)
	}
	if _, err := r.find(q.PodSandboxId, ids, Created); err != nil {
		return nil, err
	}
	l, address, err := r.listen("r", q.SessionId)
	if err != nil {
		return nil, err
	}
	x := &fakeRestore{request: marshal(q), targets: q.Containers, address: address, listener: l, done: make(chan struct{}), restored: map[string]bool{}}
	var ended context.Context
	ended, x.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(x.done)
		conn, err := l.Accept()
		l.Close()
		if err != nil {
			x.err = status.Error(codes.Aborted, "the session was finished")
			return
		}
		defer conn.Close()
		defer context.AfterFunc(ended, func() { conn.Close() })()
		x.err = x.receive(conn, q.SessionId)
	}()
	r.restores[q.SessionId] = x
	return &migration.PrepareRestoreResponse{StreamAddress: address}, nil
}

func (x *fakeRestore) receive(conn net.Conn, session string) error {
	first := make([]byte, 1)
	if _, err := io.ReadFull(conn, first); err != nil || first[0] != migration.StreamReady {
		return status.Error(codes.DataLoss, "the stream ended early")
	}
	_, _ = conn.Write(first) // A writer that has gone needs no sign.
	b, err := io.ReadAll(conn)
	if err != nil || len(b) < sha256.Size {
		return status.Error(codes.DataLoss, "the stream ended early")
	}
	state, sum := b[:len(b)-sha256.Size], sha256.Sum256(b[:len(b)-sha256.Size])
	if string(sum[:]) != string(b[len(state):]) {
		return status.Error(codes.DataLoss, "the stream does not verify")
	}
	var st fakeState
	if err := json.Unmarshal(state, &st); err != nil || st.Session != session {
		return status.Error(codes.DataLoss, "the stream belongs to another session")
	}
	for _, c := range x.targets {
		if _, ok := st.Counts[c.Name]; !ok || len(st.Counts) != len(x.targets) {
			return status.Error(codes.FailedPrecondition, "the checkpoint has other containers")
		}
	}
	x.bytes, x.digest, x.counts = len(b)+1, hex.EncodeToString(sum[:]), st.Counts
	return nil
}

func (r *Runtime) restore(id string) (*fakeRestore, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if x := r.restores[id]; x != nil {
		return x, nil
	}
	return nil, status.Errorf(codes.NotFound, "no restore session %q", id)
}

// VerifyRestore implements migration.MigrationServiceServer.
func (r *Runtime) VerifyRestore(ctx context.Context, q *migration.VerifyRestoreRequest) (*migration.VerifyRestoreResponse, error) {
	if err := r.fail(ctx, "VerifyRestore", q.SessionId); err != nil {
		return nil, err
	}
	x, err := r.restore(q.SessionId)
	if err != nil {
		return nil, err
	}
	select {
	case <-x.done:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if x.err != nil {
		return nil, x.err
	}
	return &migration.VerifyRestoreResponse{StreamBytes: uint64(x.bytes), ManifestDigest: x.digest}, nil
}

// RestoreContainer implements migration.MigrationServiceServer.
func (r *Runtime) RestoreContainer(ctx context.Context, q *migration.RestoreContainerRequest) (*migration.RestoreContainerResponse, error) {
	if err := r.fail(ctx, "RestoreContainer", q.SessionId); err != nil {
		return nil, err
	}
	x, err := r.restore(q.SessionId)
	if err != nil {
		return nil, err
	}
	select {
	case <-x.done:
	default:
		return nil, status.Error(codes.FailedPrecondition, "the checkpoint has not arrived")
	}
	if x.err != nil {
		return nil, status.Error(codes.FailedPrecondition, x.err.Error())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, target := range x.targets {
		if target.ContainerId != q.ContainerId {
			continue
		}
		c := r.containers[target.ContainerId]
		if c != nil && x.restored[c.id] {
			return &migration.RestoreContainerResponse{ResumedAt: c.since.UnixNano(), RestoreDuration: 1}, nil
		}
		if c == nil || c.state != Created {
			return nil, status.Error(codes.FailedPrecondition, "the container is not created any more")
		}
		x.restored[c.id] = true
		c.state, c.count, c.since = Running, x.counts[target.Name], time.Now()
		return &migration.RestoreContainerResponse{ResumedAt: time.Now().UnixNano(), RestoreDuration: 1}, nil
	}
	return nil, status.Errorf(codes.NotFound, "container %s is not part of the session", q.ContainerId)
}

// FinishRestore implements migration.MigrationServiceServer.
func (r *Runtime) FinishRestore(ctx context.Context, q *migration.FinishRestoreRequest) (*migration.FinishRestoreResponse, error) {
	if err := r.fail(ctx, "FinishRestore", q.SessionId); err != nil {
		return nil, err
	}
	r.mu.Lock()
	x := r.restores[q.SessionId]
	delete(r.restores, q.SessionId)
	r.mu.Unlock()
	if x != nil {
		x.cancel()
		x.listener.Close()
		<-x.done
		_ = os.RemoveAll(filepath.Dir(strings.TrimPrefix(x.address, "unix://")))
	}
	return &migration.FinishRestoreResponse{}, nil
}
