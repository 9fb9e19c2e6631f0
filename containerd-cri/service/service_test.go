package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
	"podmig.dev/podmig/containerd-cri/runtime/fake"
	"podmig.dev/podmig/cri-api/migration/migrationtest"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// world is a CRI service over the fake runtime.
type world struct {
	dir string
	rt  fake.Runtime
	// starting is called at the start of a restore.
	starting func(context.Context)
	// abandoned, if set, lets CRIU be killed in restores and hears of their end.
	abandoned chan struct{}
	// removing is called when a pod is removed.
	removing func() error
	// free is the memory of the node; 0 means enough.
	free uint64

	mu         sync.Mutex
	containers map[string]Container
	// cleaned are the containers after whose restores was cleaned up.
	cleaned []string
	// sandboxes are the pods, by their ID, with the directory of each.
	sandboxes map[string]string
	next      int
}

func newWorld(t *testing.T) *world {
	t.Helper()
	// Not t.TempDir: its long name leaves no room for the path of a socket.
	dir, err := os.MkdirTemp("", "svc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{dir: dir, containers: map[string]Container{}, sandboxes: map[string]string{}}
	w.rt.Exited = func(id string) { w.set(id, StateExited) }
	return w
}

func (w *world) set(id string, s State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.containers[id]
	c.State = s
	w.containers[id] = c
}

// Get implements Containers.
func (w *world) Get(_ context.Context, id string) (Container, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.containers[id]
	if !ok {
		return c, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// Start implements Containers.
func (w *world) Start(ctx context.Context, id string, r Restore) error {
	if w.starting != nil {
		w.starting(ctx)
	}
	if w.abandoned != nil {
		return w.startKilled(id, r)
	}
	err := passGate(r)
	if err == nil {
		err = w.rt.Restore(id, r.Images)
	}
	if err != nil {
		w.set(id, StateExited)
		return err
	}
	w.set(id, StateRunning)
	return nil
}

// passGate does what CRIU does when everything is restored and nothing runs yet.
func passGate(r Restore) error {
	script, err := actionScript(r)
	if script == "" || err != nil {
		return err
	}
	for _, action := range []string{"pre-restore", "post-restore"} {
		cmd := exec.Command(script)
		cmd.Env = append(os.Environ(), "CRTOOLS_SCRIPT_ACTION="+action)
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("aborted by the script: %w", err)
		}
	}
	return nil
}

// actionScript is what CRIU is told to call, if anything.
func actionScript(r Restore) (string, error) {
	b, err := os.ReadFile(r.Config)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if script, ok := strings.CutPrefix(strings.TrimSpace(line), "action-script "); ok {
			return script, nil
		}
	}
	return "", nil
}

// startKilled is a restore whose CRIU is killed: it returns when it is abandoned.
func (w *world) startKilled(id string, r Restore) error {
	script, err := actionScript(r)
	if err != nil {
		return err
	}
	// The shell is CRIU. It ends with the first call of the script.
	cmd := exec.Command("sh", "-c", "CRTOOLS_SCRIPT_ACTION=pre-restore "+script+"; kill -9 $$")
	if err := cmd.Run(); cmd.ProcessState == nil {
		return err
	}
	<-w.abandoned
	w.set(id, StateExited)
	return errors.New("criu failed")
}

// Clean implements Containers.
func (w *world) Clean(_ context.Context, id, _ string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cleaned = append(w.cleaned, id)
	return nil
}

// Abandon implements Containers.
func (w *world) Abandon(context.Context, string) error {
	w.abandoned <- struct{}{}
	return nil
}

func (w *world) pod(t *testing.T, n int, state State) migrationtest.Pod {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	dir := filepath.Join(w.dir, fmt.Sprintf("pod%d", w.next))
	mkdir := func(name string) string {
		d := filepath.Join(dir, name)
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		return d
	}
	w.sandboxes[fmt.Sprintf("sandbox%d", w.next)] = dir
	p := migrationtest.Pod{SandboxID: fmt.Sprintf("sandbox%d", w.next), Volumes: []*migration.Volume{{Name: "data", HostPath: mkdir("data")}}}
	for i := range n {
		name := fmt.Sprintf("c%d", i)
		id := fmt.Sprintf("%s-%s", p.SandboxID, name)
		c := Container{
			Container: runtime.Container{ID: id, Name: name}, SandboxID: p.SandboxID, State: state, ImageID: "sha256:1",
			StartedAt: time.Now(), LogPath: filepath.Join(mkdir("logs"), name+".log"), UpperDir: mkdir("upper-" + name), ShmDir: mkdir("shm"),
		}
		if state == StateRunning {
			w.rt.Run(id, 0)
			if err := os.WriteFile(c.LogPath, []byte("one line\n"), 0o640); err != nil {
				t.Fatal(err)
			}
		}
		w.containers[id] = c
		p.Containers = append(p.Containers, &migration.CheckpointContainer{ContainerId: id, Name: name})
	}
	return p
}

func (w *world) serve(t *testing.T) (*Service, migration.MigrationServiceClient) {
	t.Helper()
	s, err := New(t.Context(), Config{Dir: filepath.Join(w.dir, "s"), Containers: w, Pods: w, Runtime: &w.rt, Scratch: Dir{}, CheckImages: func(string, criu.Confinement) error { return nil }, RuntimeName: "test", RuntimeVersion: "1",
		FreeMemory: func() (uint64, error) {
			if w.free != 0 {
				return w.free, nil
			}
			return 1 << 40, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "cri"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	migration.RegisterMigrationServiceServer(srv, s)
	go func() { _ = srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
		s.Close()
	})
	return s, migration.NewMigrationServiceClient(conn)
}

func TestConformance(t *testing.T) {
	w := newWorld(t)
	_, client := w.serve(t)
	migrationtest.Conformance(t, migrationtest.Env{
		Source: client, Target: client,
		RunPod:    func(t *testing.T, n int) migrationtest.Pod { return w.pod(t, n, StateRunning) },
		CreatePod: func(t *testing.T, n int) migrationtest.Pod { return w.pod(t, n, StateCreated) },
		State: func(t *testing.T, id string) migrationtest.State {
			c, err := w.Get(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			return migrationtest.State(c.State.String())
		},
		Count: w.rt.Count,
	})
	for _, side := range []string{"c", "r"} {
		if left, _ := os.ReadDir(filepath.Join(w.dir, "s", side)); len(left) != 0 {
			t.Errorf("%d sessions are left", len(left))
		}
	}
}

// TestRestart: what a restarted process must still know.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	first, c1 := w.serve(t)
	p, q := w.pod(t, 2, StateRunning), w.pod(t, 2, StateCreated)
	ctx := t.Context()
	if freeze, verify := w.transfer(t, c1, "s", p, q); freeze != nil || verify != nil {
		t.Fatal(freeze, verify)
	}
	first.Close()

	_, c2 := w.serve(t)
	if _, err := c2.FreezeCheckpoint(ctx, &migration.FreezeCheckpointRequest{SessionId: "s"}); err == nil {
		t.Error("a session was frozen twice")
	}
	if _, err := w.rt.Count(p.Containers[0].ContainerId); err == nil {
		t.Error("the restart has thawed a container")
	}
	var g sync.WaitGroup
	for _, c := range q.Containers {
		g.Go(func() {
			if _, err := c2.RestoreContainer(ctx, &migration.RestoreContainerRequest{SessionId: "s", ContainerId: c.ContainerId}); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	if _, err := c2.FinishCheckpoint(ctx, &migration.FinishCheckpointRequest{SessionId: "s", Outcome: migration.Outcome_OUTCOME_RESUME}); err != nil {
		t.Error(err)
	}
	if _, err := w.rt.Count(p.Containers[0].ContainerId); err != nil {
		t.Error(err)
	}
	if _, err := c2.FinishRestore(ctx, &migration.FinishRestoreRequest{SessionId: "s"}); err != nil {
		t.Error(err)
	}
}

// transfer prepares both sides of a session, freezes and returns the verdict of
// the target.
func (w *world) transfer(t *testing.T, c migration.MigrationServiceClient, id string, p, q migrationtest.Pod) (freeze, verify error) {
	t.Helper()
	pc, err := c.PrepareCheckpoint(t.Context(), &migration.PrepareCheckpointRequest{SessionId: id, PodSandboxId: p.SandboxID, Containers: p.Containers, Volumes: p.Volumes, StreamVersion: 1})
	if err != nil {
		t.Fatal(err)
	}
	restore := &migration.PrepareRestoreRequest{SessionId: id, PodSandboxId: q.SandboxID, Volumes: q.Volumes, StreamVersion: 1}
	for _, c := range q.Containers {
		restore.Containers = append(restore.Containers, &migration.RestoreTarget{ContainerId: c.ContainerId, Name: c.Name})
	}
	pr, err := c.PrepareRestore(t.Context(), restore)
	if err != nil {
		t.Fatal(err)
	}
	join(t, pc.StreamAddress, pr.StreamAddress)
	_, freeze = c.FreezeCheckpoint(t.Context(), &migration.FreezeCheckpointRequest{SessionId: id})
	_, verify = c.VerifyRestore(t.Context(), &migration.VerifyRestoreRequest{SessionId: id})
	return freeze, verify
}

// TestErrors: every failure below has its code, and the session ends well.
func TestErrors(t *testing.T) {
	for _, tc := range []struct {
		name           string
		change         func(*world, migrationtest.Pod)
		freeze, verify codes.Code
	}{
		{"the freeze fails", func(w *world, _ migrationtest.Pod) { w.failAt("Freeze", context.DeadlineExceeded) }, codes.DeadlineExceeded, codes.DataLoss},
		{"the dump fails", func(w *world, _ migrationtest.Pod) { w.failAt("Dump", errors.New("criu: no")) }, codes.Unknown, codes.DataLoss},
		{"the node has no memory", func(w *world, _ migrationtest.Pod) { w.free = 1 << 20 }, codes.OK, codes.ResourceExhausted},
		{"another image", func(w *world, q migrationtest.Pod) {
			c := w.containers[q.Containers[0].ContainerId]
			c.ImageID = "sha256:2"
			w.containers[c.ID] = c
		}, codes.OK, codes.FailedPrecondition},
		{"a writable layer that is gone", func(w *world, q migrationtest.Pod) { os.RemoveAll(w.containers[q.Containers[0].ContainerId].UpperDir) }, codes.OK, codes.Unknown},
		{"a log that is a link", func(w *world, q migrationtest.Pod) {
			if err := os.Symlink("/etc/passwd", w.containers[q.Containers[0].ContainerId].LogPath); err != nil {
				panic(err)
			}
		}, codes.OK, codes.Unknown},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			_, client := w.serve(t)
			p, q := w.pod(t, 2, StateRunning), w.pod(t, 2, StateCreated)
			tc.change(w, q)
			freeze, verify := w.transfer(t, client, "s", p, q)
			// A target that refuses early may break the stream.
			if got := status.Code(freeze); got != tc.freeze && (tc.verify == codes.DataLoss || got != codes.Unknown) {
				t.Errorf("freeze: %v", freeze)
			}
			if status.Code(verify) != tc.verify {
				t.Errorf("verify: %v", verify)
			}
			w.rt.Fail = nil
			if _, err := client.FinishCheckpoint(t.Context(), &migration.FinishCheckpointRequest{SessionId: "s", Outcome: migration.Outcome_OUTCOME_RESUME}); err != nil {
				t.Error(err)
			}
			if _, err := client.FinishRestore(t.Context(), &migration.FinishRestoreRequest{SessionId: "s"}); err != nil {
				t.Error(err)
			}
			for _, c := range p.Containers {
				if _, err := w.rt.Count(c.ContainerId); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A pod that writes faster than its budget allows is not frozen at all.
func TestFreezeBudget(t *testing.T) {
	for _, budget := range []time.Duration{0, 1} {
		w := newWorld(t)
		w.rt.Writes = 100 * enoughPages
		w.rt.Fail = func(_ context.Context, method string) error {
			if method == "Freeze" && budget > 0 {
				t.Error("it is frozen")
			}
			return nil
		}
		s, client := w.serve(t)
		p := w.pod(t, 1, StateRunning)
		r, err := client.PrepareCheckpoint(t.Context(), &migration.PrepareCheckpointRequest{
			SessionId: "s", PodSandboxId: p.SandboxID, Containers: p.Containers, StreamVersion: migration.StreamVersion, FreezeBudget: int64(budget),
		})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("unix", strings.TrimPrefix(r.StreamAddress, "unix://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		<-s.checkpoints["s"].rounds
		_, err = client.FreezeCheckpoint(t.Context(), &migration.FreezeCheckpointRequest{SessionId: "s"})
		if budget == 0 && err != nil || budget > 0 && (status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "it may for 1ns: move it when it writes less")) {
			t.Errorf("with a budget of %s: %v", budget, err)
		}
		if _, err := client.FinishCheckpoint(t.Context(), &migration.FinishCheckpointRequest{SessionId: "s", Outcome: migration.Outcome_OUTCOME_RESUME}); err != nil {
			t.Error(err)
		}
		if _, err := w.rt.Count(p.Containers[0].ContainerId); err != nil {
			t.Error(err)
		}
	}
	w := newWorld(t)
	_, client := w.serve(t)
	p := w.pod(t, 1, StateRunning)
	if _, err := client.PrepareCheckpoint(t.Context(), &migration.PrepareCheckpointRequest{
		SessionId: "s", PodSandboxId: p.SandboxID, Containers: p.Containers, StreamVersion: migration.StreamVersion, FreezeBudget: -1,
	}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a negative budget: %v", err)
	}
}

func (w *world) failAt(method string, err error) {
	w.rt.Fail = func(_ context.Context, m string) error {
		if m == method {
			return err
		}
		return nil
	}
}

// TestCallerGone: a restore whose caller does not wait is not cut off, and none of its
// processes runs until somebody wants it.
func TestCallerGone(t *testing.T) {
	for _, tc := range []struct {
		name string
		// after is what somebody does when the caller has gone.
		after  func(t *testing.T, client migration.MigrationServiceClient, ids []string)
		want   State
		finish migration.Outcome
	}{
		{"nobody comes", func(*testing.T, migration.MigrationServiceClient, []string) {}, StateExited, migration.Outcome_OUTCOME_RESUME},
		{"another takes it up", func(t *testing.T, client migration.MigrationServiceClient, ids []string) {
			var g sync.WaitGroup
			for _, id := range ids {
				g.Go(func() {
					if _, err := client.RestoreContainer(t.Context(), &migration.RestoreContainerRequest{SessionId: "s", ContainerId: id}); err != nil {
						t.Error(err)
					}
				})
			}
			g.Wait()
		}, StateRunning, migration.Outcome_OUTCOME_STOP},
		{"another wants only one", func(t *testing.T, client migration.MigrationServiceClient, ids []string) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err := client.RestoreContainer(ctx, &migration.RestoreContainerRequest{SessionId: "s", ContainerId: ids[0]})
			if status.Code(err) != codes.DeadlineExceeded {
				t.Error(err)
			}
		}, StateExited, migration.Outcome_OUTCOME_RESUME},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			svc, client := w.serve(t)
			p, q := w.pod(t, 2, StateRunning), w.pod(t, 2, StateCreated)
			if freeze, verify := w.transfer(t, client, "s", p, q); freeze != nil || verify != nil {
				t.Fatal(freeze, verify)
			}
			ctx, cancel := context.WithCancel(t.Context())
			gone := make(chan struct{})
			w.starting = func(work context.Context) {
				cancel()
				<-gone
				if work.Err() != nil {
					t.Error("the restore was cut off")
				}
			}
			var g sync.WaitGroup
			var ids []string
			for _, c := range q.Containers {
				ids = append(ids, c.ContainerId)
				g.Go(func() {
					// Called directly: over a connection the news of the caller's end takes its time.
					_, err := svc.RestoreContainer(ctx, &migration.RestoreContainerRequest{SessionId: "s", ContainerId: c.ContainerId})
					if status.Code(err) != codes.Canceled {
						t.Errorf("restore: %v", err)
					}
				})
			}
			g.Wait()
			close(gone)
			tc.after(t, client, ids)
			if _, err := client.FinishRestore(t.Context(), &migration.FinishRestoreRequest{SessionId: "s"}); err != nil {
				t.Error(err)
			}
			for _, id := range ids {
				if c, _ := w.Get(t.Context(), id); c.State != tc.want {
					t.Errorf("container is %s in the end", c.State)
				}
			}
			if _, err := client.FinishCheckpoint(t.Context(), &migration.FinishCheckpointRequest{SessionId: "s", Outcome: tc.finish}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKilledCRIU: what a killed CRIU leaves does not hold up a restore for ever.
func TestKilledCRIU(t *testing.T) {
	w := newWorld(t)
	_, client := w.serve(t)
	p, q := w.pod(t, 1, StateRunning), w.pod(t, 1, StateCreated)
	if freeze, verify := w.transfer(t, client, "s", p, q); freeze != nil || verify != nil {
		t.Fatal(freeze, verify)
	}
	w.abandoned = make(chan struct{})
	_, err := client.RestoreContainer(t.Context(), &migration.RestoreContainerRequest{SessionId: "s", ContainerId: q.Containers[0].ContainerId})
	if err == nil || !strings.Contains(err.Error(), "criu failed") {
		t.Errorf("restore: %v", err)
	}
	if _, err := client.FinishRestore(t.Context(), &migration.FinishRestoreRequest{SessionId: "s"}); err != nil {
		t.Error(err)
	}
	if len(w.cleaned) != 1 || w.cleaned[0] != q.Containers[0].ContainerId {
		t.Errorf("cleaned up after %v", w.cleaned)
	}
	if _, err := client.FinishCheckpoint(t.Context(), &migration.FinishCheckpointRequest{SessionId: "s", Outcome: migration.Outcome_OUTCOME_RESUME}); err != nil {
		t.Error(err)
	}
}

// TestLost: a container that is lost after it arrived holds back those that come later.
func TestLost(t *testing.T) {
	b := newBarrier([]Container{{Container: runtime.Container{ID: "a"}}, {Container: runtime.Container{ID: "b"}}})
	b.join("a")
	b.join("b")
	b.arrive("a")
	b.lose()
	b.arrive("b")
	select {
	case <-b.passed:
		t.Fatal("they were let go")
	default:
	}
	why := errors.New("a is lost")
	b.abort(why)
	<-b.passed
	if !errors.Is(b.verdict(), why) {
		t.Errorf("verdict %v", b.verdict())
	}
}

// TestCollect: sessions that nobody connected to, or whose containers are gone, end
// by themselves.

func TestCollect(t *testing.T) {
	w := newWorld(t)
	s, client := w.serve(t)
	p, q := w.pod(t, 1, StateRunning), w.pod(t, 1, StateCreated)
	if freeze, verify := w.transfer(t, client, "gone", p, q); freeze != nil || verify != nil {
		t.Fatal(freeze, verify)
	}
	s.collect(t.Context())
	if len(s.checkpoints) != 1 || len(s.restores) != 1 {
		t.Errorf("%d and %d sessions", len(s.checkpoints), len(s.restores))
	}
	w.mu.Lock()
	clear(w.containers)
	w.mu.Unlock()
	p = w.pod(t, 1, StateRunning)
	if _, err := client.PrepareCheckpoint(t.Context(), &migration.PrepareCheckpointRequest{SessionId: "idle", PodSandboxId: p.SandboxID, Containers: p.Containers, StreamVersion: 1}); err != nil {
		t.Fatal(err)
	}
	s.c.ConnectTimeout = 0
	s.collect(t.Context())
	if len(s.checkpoints) != 0 || len(s.restores) != 0 {
		t.Errorf("%d and %d sessions are left", len(s.checkpoints), len(s.restores))
	}
	for _, side := range []string{"c", "r"} {
		if left, _ := os.ReadDir(filepath.Join(w.dir, "s", side)); len(left) != 0 {
			t.Errorf("%d directories are left", len(left))
		}
	}
}

// join carries the bytes of one stream to another.
func join(t *testing.T, from, to string) {
	t.Helper()
	in, err := net.Dial("unix", strings.TrimPrefix(from, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Dial("unix", strings.TrimPrefix(to, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer in.Close()
		defer out.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := in.Read(buf)
			if n > 0 {
				if _, werr := out.Write(buf[:n]); werr != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
}
