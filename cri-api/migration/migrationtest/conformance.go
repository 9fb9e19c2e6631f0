package migrationtest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// State is the CRI state of a container.
type State string

const (
	Created State = "created"
	Running State = "running"
	Exited  State = "exited"
)

// Pod is a sandbox with containers and volumes. The containers count.
type Pod struct {
	SandboxID  string
	Containers []*migration.CheckpointContainer
	Volumes    []*migration.Volume
}

// Env is a runtime under test with the means to make and watch its containers.
type Env struct {
	// Source and Target serve the extension; they may be the same.
	Source, Target migration.MigrationServiceClient
	// RunPod starts a pod of n containers on the source. Their names are c0, c1, …,
	// and each counts from 0, many times per second.
	RunPod func(t *testing.T, n int) Pod
	// CreatePod makes the counterpart of such a pod on the target: containers in
	// CREATED state with the same names and images.
	CreatePod func(t *testing.T, n int) Pod
	// State and Count observe a container of either side. Count fails for
	// containers that do not answer.
	State func(t *testing.T, containerID string) State
	Count func(containerID string) (int, error)
}

const timeout = 90 * time.Second

// Conformance checks that a runtime keeps the contract of migration.proto.
func Conformance(t *testing.T, env Env) {
	for _, tc := range []struct {
		name string
		test func(*testing.T, *suite)
	}{
		{"features name versions", testFeatures},
		{"preflight finds nothing in a plain pod", testPreflight},
		{"requests that can never work are invalid", testInvalid},
		{"what does not exist is not found", testNotFound},
		{"prepare is idempotent", testPrepareTwice},
		{"a stream is private and has one peer", testPrivate},
		{"a freeze needs a reader", testNoReader},
		{"a pod moves", testMove},
		{"a frozen pod resumes", testResume},
		{"a pod that was never frozen resumes and stops", testFinishEarly},
		{"an unknown session finishes by its containers", testFinishUnknown},
		{"a finish interrupts a freeze", testFinishInterrupts},
		{"a truncated stream is refused", testTruncated},
		{"a changed stream is refused", testChanged},
		{"a stream of another session is refused", testOtherSession},
		{"a restore needs a checkpoint", testRestoreEarly},
		{"a restored container is not restored twice", testRestoreTwice},
		{"a released restore leaves created containers", testFinishRestore},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			t.Cleanup(cancel)
			tc.test(t, &suite{Env: env, ctx: ctx, t: t})
		})
	}
}

type suite struct {
	Env
	ctx context.Context
	t   *testing.T
}

var sessions struct {
	sync.Mutex
	n int
}

func session() string {
	sessions.Lock()
	defer sessions.Unlock()
	sessions.n++
	return fmt.Sprintf("conformance-%d-%d", os.Getpid(), sessions.n)
}

func (s *suite) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *suite) wantCode(err error, want ...codes.Code) {
	s.t.Helper()
	got := status.Code(err)
	for _, c := range want {
		if c == got {
			return
		}
	}
	s.t.Fatalf("error %v, want code %v", err, want)
}

func checkpointRequest(id string, p Pod) *migration.PrepareCheckpointRequest {
	return &migration.PrepareCheckpointRequest{SessionId: id, PodSandboxId: p.SandboxID, Containers: p.Containers, Volumes: p.Volumes, StreamVersion: 1}
}

func restoreRequest(id string, p Pod) *migration.PrepareRestoreRequest {
	r := &migration.PrepareRestoreRequest{SessionId: id, PodSandboxId: p.SandboxID, Volumes: p.Volumes, StreamVersion: 1}
	for _, c := range p.Containers {
		r.Containers = append(r.Containers, &migration.RestoreTarget{ContainerId: c.ContainerId, Name: c.Name})
	}
	return r
}

func (s *suite) prepareCheckpoint(id string, p Pod) string {
	s.t.Helper()
	r, err := s.Source.PrepareCheckpoint(s.ctx, checkpointRequest(id, p))
	s.must(err)
	s.t.Cleanup(func() { s.finish(id, p, migration.Outcome_OUTCOME_RESUME) })
	return r.StreamAddress
}

func (s *suite) prepareRestore(id string, p Pod) string {
	s.t.Helper()
	r, err := s.Target.PrepareRestore(s.ctx, restoreRequest(id, p))
	s.must(err)
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		if _, err := s.Target.FinishRestore(ctx, &migration.FinishRestoreRequest{SessionId: id}); err != nil {
			s.t.Errorf("finish restore: %v", err)
		}
	})
	return r.StreamAddress
}

func (s *suite) finish(id string, p Pod, o migration.Outcome) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	r := &migration.FinishCheckpointRequest{SessionId: id, Outcome: o}
	for _, c := range p.Containers {
		r.ContainerIds = append(r.ContainerIds, c.ContainerId)
	}
	if _, err := s.Source.FinishCheckpoint(ctx, r); err != nil {
		s.t.Errorf("finish checkpoint: %v", err)
	}
}

func (s *suite) dial(address string) net.Conn {
	s.t.Helper()
	c, err := dial(address)
	s.must(err)
	s.t.Cleanup(func() { c.Close() })
	return c
}

func dial(address string) (net.Conn, error) {
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok {
		return nil, fmt.Errorf("address %q is no unix socket", address)
	}
	c, err := net.DialTimeout("unix", path, 10*time.Second)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(timeout))
}

// end ends the writing of a stream: what comes back is read, because a connection that
// is closed before tells the reader that it was broken.
func end(out net.Conn) {
	_ = out.(*net.UnixConn).CloseWrite()
	_, _ = io.Copy(io.Discard, out)
	_ = out.Close()
}

func (s *suite) freeze(id string) (*migration.FreezeCheckpointResponse, error) {
	return s.Source.FreezeCheckpoint(s.ctx, &migration.FreezeCheckpointRequest{SessionId: id})
}

// record freezes a pod and returns its stream.
func (s *suite) record(id string, p Pod) ([]byte, *migration.FreezeCheckpointResponse) {
	s.t.Helper()
	in := s.dial(s.prepareCheckpoint(id, p))
	data := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(in)
		data <- b
	}()
	r, err := s.freeze(id)
	if err != nil {
		in.Close()
	}
	// What was sent may still be on its way.
	b := <-data
	s.must(err)
	return b, r
}

// send writes a stream to a restore session and returns what it says.
func (s *suite) send(id string, p Pod, stream []byte) (*migration.VerifyRestoreResponse, error) {
	s.t.Helper()
	out := s.dial(s.prepareRestore(id, p))
	// A refusing reader may close early; what counts is its verdict.
	_, _ = out.Write(stream)
	end(out)
	return s.Target.VerifyRestore(s.ctx, &migration.VerifyRestoreRequest{SessionId: id})
}

func (s *suite) restore(id, container string) error {
	_, err := s.Target.RestoreContainer(s.ctx, &migration.RestoreContainerRequest{SessionId: id, ContainerId: container})
	return err
}

func (s *suite) counts(p Pod) []int {
	s.t.Helper()
	var out []int
	for _, c := range p.Containers {
		n, err := s.Count(c.ContainerId)
		s.must(err)
		out = append(out, n)
	}
	return out
}

func (s *suite) wantState(p Pod, want State) {
	s.t.Helper()
	s.eventually("state "+string(want), func() error {
		for _, c := range p.Containers {
			if got := s.State(s.t, c.ContainerId); got != want {
				return fmt.Errorf("container %s is %s", c.Name, got)
			}
		}
		return nil
	})
}

// wantCounting waits until every container has counted beyond where it was.
func (s *suite) wantCounting(p Pod, from []int) {
	s.t.Helper()
	for i, c := range p.Containers {
		s.eventually("container "+c.Name+" counts on", func() error {
			n, err := s.Count(c.ContainerId)
			if err == nil && n <= from[i] {
				err = fmt.Errorf("count is %d, it was %d", n, from[i])
			}
			return err
		})
	}
}

func (s *suite) eventually(what string, f func() error) {
	s.t.Helper()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-s.ctx.Done():
			s.t.Fatalf("%s: %v", what, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func testFeatures(t *testing.T, s *suite) {
	for name, c := range map[string]migration.MigrationServiceClient{"source": s.Source, "target": s.Target} {
		f, err := c.Features(s.ctx, &migration.FeaturesRequest{})
		s.must(err)
		if len(f.StreamVersions) == 0 || f.StreamVersions[0] != 1 {
			t.Errorf("%s: stream versions %v do not begin with 1", name, f.StreamVersions)
		}
		for field, v := range map[string]string{"runtime name": f.RuntimeName, "OCI runtime name": f.OciRuntimeName, "CRIU version": f.CriuVersion,
			"kernel release": f.KernelRelease, "architecture": f.Architecture} {
			if v == "" {
				t.Errorf("%s: no %s", name, field)
			}
		}
		if len(f.CpuFeatures) == 0 || f.Kernel == nil {
			t.Errorf("%s: no CPU or kernel features", name)
		}
		switch f.CgroupMode {
		case "v1", "hybrid", "v2":
		default:
			t.Errorf("%s: cgroup mode %q", name, f.CgroupMode)
		}
	}
}

func preflightRequest(p Pod) *migration.PreflightPodRequest {
	r := &migration.PreflightPodRequest{PodSandboxId: p.SandboxID}
	for _, c := range p.Containers {
		r.ContainerIds = append(r.ContainerIds, c.ContainerId)
	}
	return r
}

func testPreflight(t *testing.T, s *suite) {
	p := s.RunPod(t, 2)
	r, err := s.Source.PreflightPod(s.ctx, preflightRequest(p))
	s.must(err)
	for _, f := range r.Findings {
		if f.Severity == migration.Finding_SEVERITY_BLOCKING || f.Message == "" || f.Cure == "" {
			t.Errorf("finding %v", f)
		}
	}
	if r.MemoryBytes == 0 {
		t.Error("no memory is needed")
	}
	s.wantCounting(p, s.counts(p))
}

func testInvalid(t *testing.T, s *suite) {
	p, q := s.RunPod(t, 1), s.CreatePod(t, 1)
	for _, tc := range []struct {
		name   string
		change func(*migration.PrepareCheckpointRequest)
	}{
		{"no session", func(r *migration.PrepareCheckpointRequest) { r.SessionId = "" }},
		{"unknown option", func(r *migration.PrepareCheckpointRequest) { r.Options = map[string]string{"example.com/x": "1"} }},
		{"unknown version", func(r *migration.PrepareCheckpointRequest) { r.StreamVersion = 99 }},
		{"no containers", func(r *migration.PrepareCheckpointRequest) { r.Containers = nil }},
		{"a container twice", func(r *migration.PrepareCheckpointRequest) { r.Containers = append(r.Containers, r.Containers[0]) }},
		{"other sandbox", func(r *migration.PrepareCheckpointRequest) { r.PodSandboxId = q.SandboxID + "x" }},
		{"relative volume", func(r *migration.PrepareCheckpointRequest) {
			r.Volumes = []*migration.Volume{{Name: "v", HostPath: "tmp"}}
		}},
	} {
		r := checkpointRequest(session(), p)
		r.Containers = append([]*migration.CheckpointContainer(nil), r.Containers...)
		tc.change(r)
		if _, err := s.Source.PrepareCheckpoint(s.ctx, r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("checkpoint, %s: %v", tc.name, err)
		}
	}
	r := restoreRequest(session(), q)
	r.Options = map[string]string{"example.com/x": "1"}
	_, err := s.Target.PrepareRestore(s.ctx, r)
	s.wantCode(err, codes.InvalidArgument)
	pr := preflightRequest(p)
	pr.Options = map[string]string{"example.com/x": "1"}
	_, err = s.Source.PreflightPod(s.ctx, pr)
	s.wantCode(err, codes.InvalidArgument)
	_, err = s.Source.FinishCheckpoint(s.ctx, &migration.FinishCheckpointRequest{SessionId: session()})
	s.wantCode(err, codes.InvalidArgument)
	// The wrong state is another error than a wrong request.
	_, err = s.Source.PrepareCheckpoint(s.ctx, checkpointRequest(session(), q))
	s.wantCode(err, codes.FailedPrecondition)
	_, err = s.Target.PrepareRestore(s.ctx, restoreRequest(session(), p))
	s.wantCode(err, codes.FailedPrecondition)
}

func testNotFound(t *testing.T, s *suite) {
	p := s.RunPod(t, 1)
	p.Containers = []*migration.CheckpointContainer{{ContainerId: strings.Repeat("0", 64), Name: "c0"}}
	_, err := s.Source.PrepareCheckpoint(s.ctx, checkpointRequest(session(), p))
	s.wantCode(err, codes.NotFound)
	_, err = s.Source.PreflightPod(s.ctx, preflightRequest(p))
	s.wantCode(err, codes.NotFound)
	_, err = s.freeze(session())
	s.wantCode(err, codes.NotFound)
	_, err = s.Target.VerifyRestore(s.ctx, &migration.VerifyRestoreRequest{SessionId: session()})
	s.wantCode(err, codes.NotFound)
	s.wantCode(s.restore(session(), "x"), codes.NotFound)
	_, err = s.Target.FinishRestore(s.ctx, &migration.FinishRestoreRequest{SessionId: session()})
	s.must(err)
}

func testPrepareTwice(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 2), s.CreatePod(t, 2), session()
	a := s.prepareCheckpoint(id, p)
	b := s.prepareRestore(id, q)
	if a == b {
		t.Error("both sides of a session share an address")
	}
	c, err := s.Source.PrepareCheckpoint(s.ctx, checkpointRequest(id, p))
	s.must(err)
	r, err := s.Target.PrepareRestore(s.ctx, restoreRequest(id, q))
	s.must(err)
	if c.StreamAddress != a || r.StreamAddress != b {
		t.Error("a repeated prepare returns another address")
	}
	fewer := p
	fewer.Containers = p.Containers[:1]
	_, err = s.Source.PrepareCheckpoint(s.ctx, checkpointRequest(id, fewer))
	s.wantCode(err, codes.AlreadyExists)
	fewer = q
	fewer.Containers = q.Containers[:1]
	_, err = s.Target.PrepareRestore(s.ctx, restoreRequest(id, fewer))
	s.wantCode(err, codes.AlreadyExists)
}

func testPrivate(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 1), s.CreatePod(t, 1), session()
	for _, address := range []string{s.prepareCheckpoint(id, p), s.prepareRestore(id, q)} {
		path := strings.TrimPrefix(address, "unix://")
		st, err := os.Stat(path)
		s.must(err)
		dir, err := os.Stat(filepath.Dir(path))
		s.must(err)
		if st.Mode().Perm()&0o077 != 0 || st.Mode()&fs.ModeSocket == 0 || dir.Mode().Perm()&0o077 != 0 {
			t.Errorf("socket %v in a directory %v is not private", st.Mode(), dir.Mode())
		}
		s.dial(address)
		s.eventually("a second peer is refused", func() error {
			c, err := dial(address)
			if err != nil {
				return nil
			}
			defer c.Close()
			return fmt.Errorf("connected")
		})
	}
}

func testNoReader(t *testing.T, s *suite) {
	p, id := s.RunPod(t, 1), session()
	s.prepareCheckpoint(id, p)
	before := s.counts(p)
	_, err := s.freeze(id)
	s.wantCode(err, codes.FailedPrecondition)
	s.wantCounting(p, before)
}

func testMove(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 2), s.CreatePod(t, 2), session()
	in, out := s.dial(s.prepareCheckpoint(id, p)), s.dial(s.prepareRestore(id, q))
	pumped := make(chan struct{})
	go func() {
		defer close(pumped)
		_, _ = io.Copy(out, in)
	}()
	if err := WaitReady(out); err != nil {
		t.Fatalf("the target does not say that the rounds before the freeze are over: %v", err)
	}
	go func() {
		<-pumped
		end(out)
	}()
	before := s.counts(p)
	start := time.Now()
	f, err := s.freeze(id)
	s.must(err)
	v, err := s.Target.VerifyRestore(s.ctx, &migration.VerifyRestoreRequest{SessionId: id})
	s.must(err)
	if f.FrozenAt < start.UnixNano() || f.FrozenAt > time.Now().UnixNano() || f.FinalBytes == 0 || f.FinalBytes > f.StreamBytes {
		t.Errorf("freeze reports %v", f)
	}
	if v.StreamBytes != f.StreamBytes || len(v.ManifestDigest) != 64 {
		t.Errorf("sent %d bytes, received %d with manifest %q", f.StreamBytes, v.StreamBytes, v.ManifestDigest)
	}
	s.wantState(p, Running) // frozen, but neither killed nor restarted
	s.wantState(q, Created)
	var wg sync.WaitGroup
	errs := make([]error, len(q.Containers))
	for i, c := range q.Containers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[i] = s.restore(id, c.ContainerId)
		}()
	}
	wg.Wait()
	for _, err := range errs {
		s.must(err)
	}
	s.wantState(q, Running)
	s.wantCounting(q, before)
	_, err = s.Target.FinishRestore(s.ctx, &migration.FinishRestoreRequest{SessionId: id})
	s.must(err)
	s.finish(id, p, migration.Outcome_OUTCOME_STOP)
	s.finish(id, p, migration.Outcome_OUTCOME_STOP)
	s.wantState(p, Exited)
	s.wantCounting(q, s.counts(q))
}

func testResume(t *testing.T, s *suite) {
	p, id := s.RunPod(t, 2), session()
	before := s.counts(p)
	s.record(id, p)
	_, err := s.freeze(id)
	s.wantCode(err, codes.FailedPrecondition)
	s.finish(id, p, migration.Outcome_OUTCOME_RESUME)
	s.wantState(p, Running)
	s.wantCounting(p, before)
	// The same pod can be moved again.
	s.record(session(), p)
}

func testFinishEarly(t *testing.T, s *suite) {
	p, id := s.RunPod(t, 1), session()
	s.prepareCheckpoint(id, p)
	s.finish(id, p, migration.Outcome_OUTCOME_RESUME)
	s.wantCounting(p, s.counts(p))
	id = session()
	s.prepareCheckpoint(id, p)
	s.finish(id, p, migration.Outcome_OUTCOME_STOP)
	s.wantState(p, Exited)
}

func testFinishUnknown(t *testing.T, s *suite) {
	p := s.RunPod(t, 2)
	s.finish(session(), p, migration.Outcome_OUTCOME_RESUME)
	s.wantCounting(p, s.counts(p))
	s.finish(session(), p, migration.Outcome_OUTCOME_STOP)
	s.wantState(p, Exited)
	gone := Pod{Containers: []*migration.CheckpointContainer{{ContainerId: strings.Repeat("0", 64)}}}
	s.finish(session(), gone, migration.Outcome_OUTCOME_STOP)
}

func testFinishInterrupts(t *testing.T, s *suite) {
	p, id := s.RunPod(t, 1), session()
	// A reader that never reads: the freeze can not end by itself.
	s.dial(s.prepareCheckpoint(id, p))
	before := s.counts(p)
	done := make(chan error, 1)
	go func() {
		_, err := s.freeze(id)
		done <- err
	}()
	select {
	case err := <-done:
		// A small checkpoint fits the buffers of the socket.
		s.must(err)
		done <- nil
	case <-time.After(2 * time.Second):
	}
	s.finish(id, p, migration.Outcome_OUTCOME_RESUME)
	if err := <-done; err != nil {
		s.wantCode(err, codes.Aborted)
	}
	s.wantCounting(p, before)
}

func testTruncated(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 1), s.CreatePod(t, 1), session()
	b, _ := s.record(id, p)
	_, err := s.send(id, q, b[:len(b)*2/3])
	s.wantCode(err, codes.DataLoss)
	s.wantCode(s.restore(id, q.Containers[0].ContainerId), codes.FailedPrecondition)
	s.wantState(q, Created)
}

func testChanged(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 1), s.CreatePod(t, 1), session()
	b, _ := s.record(id, p)
	b[len(b)/2] ^= 1
	_, err := s.send(id, q, b)
	s.wantCode(err, codes.DataLoss)
	s.wantCode(s.restore(id, q.Containers[0].ContainerId), codes.FailedPrecondition)
	s.wantState(q, Created)
}

func testOtherSession(t *testing.T, s *suite) {
	p, q := s.RunPod(t, 1), s.CreatePod(t, 1)
	b, _ := s.record(session(), p)
	_, err := s.send(session(), q, b)
	s.wantCode(err, codes.DataLoss)
}

func testRestoreEarly(t *testing.T, s *suite) {
	q, id := s.CreatePod(t, 1), session()
	s.prepareRestore(id, q)
	s.wantCode(s.restore(id, q.Containers[0].ContainerId), codes.FailedPrecondition)
	ctx, cancel := context.WithTimeout(s.ctx, 200*time.Millisecond)
	defer cancel()
	_, err := s.Target.VerifyRestore(ctx, &migration.VerifyRestoreRequest{SessionId: id})
	s.wantCode(err, codes.DeadlineExceeded)
}

func testRestoreTwice(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 1), s.CreatePod(t, 1), session()
	b, f := s.record(id, p)
	v, err := s.send(id, q, b)
	s.must(err)
	if v.StreamBytes != f.StreamBytes {
		t.Errorf("sent %d bytes, received %d", f.StreamBytes, v.StreamBytes)
	}
	s.must(s.restore(id, q.Containers[0].ContainerId))
	s.wantState(q, Running)
	before := s.counts(q)
	s.must(s.restore(id, q.Containers[0].ContainerId))
	s.wantCounting(q, before)
	s.wantCode(s.restore(id, "another"), codes.NotFound)
	s.finish(id, p, migration.Outcome_OUTCOME_STOP)
	s.wantState(p, Exited)
}

func testFinishRestore(t *testing.T, s *suite) {
	p, q, id := s.RunPod(t, 1), s.CreatePod(t, 1), session()
	b, _ := s.record(id, p)
	_, err := s.send(id, q, b)
	s.must(err)
	_, err = s.Target.FinishRestore(s.ctx, &migration.FinishRestoreRequest{SessionId: id})
	s.must(err)
	_, err = s.Target.FinishRestore(s.ctx, &migration.FinishRestoreRequest{SessionId: id})
	s.must(err)
	s.wantCode(s.restore(id, q.Containers[0].ContainerId), codes.NotFound)
	s.wantState(q, Created)
	s.finish(id, p, migration.Outcome_OUTCOME_RESUME)
	s.wantCounting(p, make([]int, len(p.Containers)))
}

// WaitReady reads what a runtime writes back until it says that the source should be frozen.
func WaitReady(r io.Reader) error {
	sign := make([]byte, 9)
	for {
		if _, err := io.ReadFull(r, sign[:1]); err != nil {
			return err
		}
		switch sign[0] {
		case migration.StreamReady:
			return nil
		case migration.StreamExpected:
			if _, err := io.ReadFull(r, sign[1:]); err != nil {
				return err
			}
		default:
			return fmt.Errorf("unknown sign %q", sign[0])
		}
	}
}
