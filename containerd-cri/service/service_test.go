package service

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

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

	mu         sync.Mutex
	containers map[string]Container
	next       int
}

func newWorld(t *testing.T) *world {
	t.Helper()
	// Not t.TempDir: its long name leaves no room for the path of a socket.
	dir, err := os.MkdirTemp("", "svc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{dir: dir, containers: map[string]Container{}}
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
func (w *world) Start(_ context.Context, id string, r Restore) error {
	if err := w.rt.Restore(id, r.Images); err != nil {
		w.set(id, StateExited)
		return err
	}
	w.set(id, StateRunning)
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
	s, err := New(t.Context(), Config{Dir: filepath.Join(w.dir, "s"), Containers: w, Runtime: &w.rt, Scratch: Dir{}, CheckImages: func(string, criu.Confinement) error { return nil }, RuntimeName: "test", RuntimeVersion: "1"})
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
	prepare := &migration.PrepareCheckpointRequest{SessionId: "s", PodSandboxId: p.SandboxID, Containers: p.Containers, Volumes: p.Volumes, StreamVersion: 1}
	pc, err := c1.PrepareCheckpoint(ctx, prepare)
	if err != nil {
		t.Fatal(err)
	}
	restore := &migration.PrepareRestoreRequest{SessionId: "s", PodSandboxId: q.SandboxID, Volumes: q.Volumes, StreamVersion: 1}
	for _, c := range q.Containers {
		restore.Containers = append(restore.Containers, &migration.RestoreTarget{ContainerId: c.ContainerId, Name: c.Name})
	}
	pr, err := c1.PrepareRestore(ctx, restore)
	if err != nil {
		t.Fatal(err)
	}
	join(t, pc.StreamAddress, pr.StreamAddress)
	if _, err := c1.FreezeCheckpoint(ctx, &migration.FreezeCheckpointRequest{SessionId: "s"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c1.VerifyRestore(ctx, &migration.VerifyRestoreRequest{SessionId: "s"}); err != nil {
		t.Fatal(err)
	}
	first.Close()

	_, c2 := w.serve(t)
	if _, err := c2.FreezeCheckpoint(ctx, &migration.FreezeCheckpointRequest{SessionId: "s"}); err == nil {
		t.Error("a session was frozen twice")
	}
	if _, err := w.rt.Count(p.Containers[0].ContainerId); err == nil {
		t.Error("the restart has thawed a container")
	}
	for _, c := range q.Containers {
		if _, err := c2.RestoreContainer(ctx, &migration.RestoreContainerRequest{SessionId: "s", ContainerId: c.ContainerId}); err != nil {
			t.Error(err)
		}
	}
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
