package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/cri-api/migration/migrationtest"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// PodSandboxStatus implements Pods.
func (w *world) PodSandboxStatus(_ context.Context, q *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.sandboxes[q.PodSandboxId]; !ok {
		return nil, fmt.Errorf("sandbox %s: %w", q.PodSandboxId, errdefs.ErrNotFound)
	}
	return &cri.PodSandboxStatusResponse{Status: &cri.PodSandboxStatus{Id: q.PodSandboxId, State: cri.PodSandboxState_SANDBOX_READY}}, nil
}

// RunPodSandbox implements Pods.
func (w *world) RunPodSandbox(_ context.Context, q *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	if q.RuntimeHandler != "" {
		return nil, fmt.Errorf("no runtime for %q is configured", q.RuntimeHandler)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := fmt.Sprintf("restored%d", w.next)
	w.sandboxes[id] = filepath.Join(w.dir, id)
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox implements Pods.
func (w *world) StopPodSandbox(context.Context, *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	return &cri.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox implements Pods.
func (w *world) RemovePodSandbox(_ context.Context, q *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	if w.removing != nil {
		if err := w.removing(); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, c := range w.containers {
		if c.SandboxID == q.PodSandboxId {
			delete(w.containers, id)
		}
	}
	delete(w.sandboxes, q.PodSandboxId)
	return &cri.RemovePodSandboxResponse{}, nil
}

// CreateContainer implements Pods.
func (w *world) CreateContainer(_ context.Context, q *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	name, dir := q.Config.Metadata.Name, w.sandboxes[q.PodSandboxId]
	if q.Config.Image.GetImage() == "missing" {
		return nil, fmt.Errorf("image: %w", errdefs.ErrNotFound)
	}
	c := Container{
		Container: runtime.Container{ID: q.PodSandboxId + "-" + name, Name: name}, SandboxID: q.PodSandboxId, State: StateCreated, ImageID: "sha256:1",
		LogPath: filepath.Join(dir, "logs", name+".log"), UpperDir: filepath.Join(dir, "upper-"+name), ShmDir: filepath.Join(dir, "shm"), Args: q.Config.Args,
		Process: checkpoint.Process{Cwd: q.Config.WorkingDir, UID: uint32(q.Config.GetLinux().GetSecurityContext().GetRunAsUser().GetValue())},
	}
	for _, e := range q.Config.Envs {
		c.Process.Env = append(c.Process.Env, e.Key+"="+string(e.Value))
	}
	for _, d := range []string{c.UpperDir, c.ShmDir, filepath.Dir(c.LogPath)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	w.containers[c.ID] = c
	return &cri.CreateContainerResponse{ContainerId: c.ID}, nil
}

func checkpointRequest(p migrationtest.Pod, dir string) *cri.CheckpointPodRequest {
	q := &cri.CheckpointPodRequest{PodSandboxId: p.SandboxID, OutputPath: dir}
	for _, c := range p.Containers {
		q.ContainerIds = append(q.ContainerIds, c.ContainerId)
	}
	return q
}

func restoreRequest(dir string, names ...string) *cri.RestorePodRequest {
	q := &cri.RestorePodRequest{CheckpointPath: dir, Config: &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "restored"}}}
	for _, n := range names {
		q.ContainerConfigs = append(q.ContainerConfigs, &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: n}, Image: &cri.ImageSpec{Image: "image"}})
	}
	return q
}

func minute(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func outputDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sessionsLeft returns how many sessions there are, in memory and on disk.
func (w *world) sessionsLeft(t *testing.T, s *Service) int {
	t.Helper()
	s.mu.Lock()
	n := len(s.checkpoints) + len(s.restores)
	s.mu.Unlock()
	for _, side := range []string{"c", "r"} {
		left, err := os.ReadDir(filepath.Join(w.dir, "s", side))
		if err != nil {
			t.Fatal(err)
		}
		n += len(left)
	}
	return n
}

func TestPod(t *testing.T) {
	w := newWorld(t)
	s, _ := w.serve(t)
	p, dir := w.pod(t, 2, StateRunning), outputDir(t)
	upper := w.containers[p.Containers[1].ContainerId].UpperDir
	if err := os.WriteFile(filepath.Join(upper, "file"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	q := checkpointRequest(p, dir)
	q.Options = map[string]string{migration.VolumeOption + "data": p.Volumes[0].HostPath}
	if err := os.WriteFile(filepath.Join(p.Volumes[0].HostPath, "v"), []byte("volume"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CheckpointPod(minute(t), q); err != nil {
		t.Fatal(err)
	}
	if _, err := w.rt.Count(p.Containers[0].ContainerId); err != nil {
		t.Errorf("the pod does not run on: %v", err)
	}
	if n := w.sessionsLeft(t, s); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if st, err := d.Info(); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v, %v", path, st.Mode(), err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CheckpointPod(minute(t), q); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a second checkpoint in one directory: %v", err)
	}

	for _, restart := range []bool{false, true} {
		data := t.TempDir()
		r := restoreRequest(dir, "c1", "c0")
		r.Options = map[string]string{migration.VolumeOption + "data": data}
		res, err := s.RestorePod(minute(t), r)
		if err != nil {
			t.Fatal(err)
		}
		if len(res.RestoredContainers) != 2 || res.PodSandboxId == "" {
			t.Fatalf("%v", res)
		}
		if b, err := os.ReadFile(filepath.Join(data, "v")); string(b) != "volume" {
			t.Errorf("the volume holds %q, %v", b, err)
		}
		if restart {
			s.Close()
			s, _ = w.serve(t)
			s.collect(t.Context())
		}
		for _, c := range res.RestoredContainers {
			x, err := w.Get(t.Context(), c.ContainerId)
			if err != nil || x.State != StateCreated || x.Name != c.Name {
				t.Fatalf("%v, %v", x, err)
			}
			// A short ID will do.
			if prepared, err := s.StartContainer(minute(t), c.ContainerId); !prepared || err != nil {
				t.Errorf("start of %s: %v, %v", c.Name, prepared, err)
			}
			if _, err := w.rt.Count(c.ContainerId); err != nil {
				t.Error(err)
			}
		}
		x, _ := w.Get(t.Context(), res.PodSandboxId+"-c1")
		if b, err := os.ReadFile(filepath.Join(x.UpperDir, "file")); string(b) != "kept" {
			t.Errorf("the writable layer holds %q, %v", b, err)
		}
		if n := w.sessionsLeft(t, s); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	}
	if prepared, _ := s.StartContainer(minute(t), p.Containers[0].ContainerId); prepared {
		t.Error("a container that was never prepared was resumed")
	}
}

func TestCheckpointPodRefuses(t *testing.T) {
	w := newWorld(t)
	s, client := w.serve(t)
	p, other := w.pod(t, 2, StateRunning), w.pod(t, 1, StateRunning)
	stopped := w.pod(t, 1, StateExited)
	used := outputDir(t)
	if err := os.WriteFile(filepath.Join(used, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	shared := outputDir(t)
	if err := os.Chmod(shared, 0o770); err != nil {
		t.Fatal(err)
	}
	dir := outputDir(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*cri.CheckpointPodRequest)
		code   codes.Code
	}{
		{"an unknown option", func(q *cri.CheckpointPodRequest) { q.Options = map[string]string{"x": "y"} }, codes.InvalidArgument},
		{"a volume without a directory", func(q *cri.CheckpointPodRequest) { q.Options = map[string]string{migration.VolumeOption + "v": "v"} }, codes.InvalidArgument},
		{"a relative path", func(q *cri.CheckpointPodRequest) { q.OutputPath = "x" }, codes.InvalidArgument},
		{"a path with dots", func(q *cri.CheckpointPodRequest) { q.OutputPath = dir + "/../x" }, codes.InvalidArgument},
		{"a directory that is not there", func(q *cri.CheckpointPodRequest) { q.OutputPath = dir + "/x" }, codes.InvalidArgument},
		{"a link", func(q *cri.CheckpointPodRequest) { q.OutputPath = link }, codes.InvalidArgument},
		{"a file", func(q *cri.CheckpointPodRequest) { q.OutputPath = used + "/mine" }, codes.InvalidArgument},
		{"a directory in use", func(q *cri.CheckpointPodRequest) { q.OutputPath = used }, codes.AlreadyExists},
		{"a directory that others can write to", func(q *cri.CheckpointPodRequest) { q.OutputPath = shared }, codes.InvalidArgument},
		{"an unknown sandbox", func(q *cri.CheckpointPodRequest) { q.PodSandboxId = "x" }, codes.NotFound},
		{"an unknown container", func(q *cri.CheckpointPodRequest) { q.ContainerIds[1] = "x" }, codes.NotFound},
		{"no containers", func(q *cri.CheckpointPodRequest) { q.ContainerIds = nil }, codes.InvalidArgument},
		{"a container twice", func(q *cri.CheckpointPodRequest) { q.ContainerIds[1] = q.ContainerIds[0] }, codes.InvalidArgument},
		{"a container of another pod", func(q *cri.CheckpointPodRequest) { q.ContainerIds[1] = other.Containers[0].ContainerId }, codes.InvalidArgument},
		{"a container that does not run", func(q *cri.CheckpointPodRequest) {
			q.PodSandboxId, q.ContainerIds = stopped.SandboxID, []string{stopped.Containers[0].ContainerId}
		}, codes.FailedPrecondition},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q := checkpointRequest(p, dir)
			tc.change(q)
			if _, err := s.CheckpointPod(minute(t), q); status.Code(err) != tc.code {
				t.Error(err)
			}
		})
	}
	if _, err := s.CheckpointPod(t.Context(), checkpointRequest(p, dir)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without a deadline: %v", err)
	}
	// A pod in the hands of a migration stays there.
	if _, err := client.PrepareCheckpoint(t.Context(), &migration.PrepareCheckpointRequest{SessionId: "m", PodSandboxId: p.SandboxID, Containers: p.Containers, StreamVersion: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, dir)); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("while it is moved: %v", err)
	}
	if _, err := client.FinishCheckpoint(t.Context(), &migration.FinishCheckpointRequest{SessionId: "m", Outcome: migration.Outcome_OUTCOME_RESUME}); err != nil {
		t.Fatal(err)
	}
	// So does one that somebody else has paused.
	c := w.containers[p.Containers[0].ContainerId].Container
	if err := w.rt.Freeze(t.Context(), []runtime.Container{c}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, dir)); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("while it is paused: %v", err)
	}
	if frozen, _ := w.rt.Frozen(t.Context(), c); !frozen {
		t.Error("a paused container was resumed")
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("%v in the directory, %v", files, err)
	}
	if n := w.sessionsLeft(t, s); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

// TestCheckpointPodFails: whatever fails, the pod runs on and the directory is empty.
func TestCheckpointPodFails(t *testing.T) {
	for _, tc := range []struct {
		name string
		fail func(*world, *Service, context.CancelFunc, string) error
	}{
		{"the freeze fails", func(_ *world, _ *Service, _ context.CancelFunc, m string) error { return at(m, "Freeze") }},
		{"the dump fails", func(_ *world, _ *Service, _ context.CancelFunc, m string) error { return at(m, "Dump") }},
		{"the caller goes", func(_ *world, _ *Service, cancel context.CancelFunc, m string) error {
			if m == "Dump" {
				cancel()
			}
			return nil
		}},
		{"the process is restarted", func(w *world, s *Service, _ context.CancelFunc, m string) error {
			if m != "Dump" {
				return nil
			}
			w.rt.Fail = nil
			next, err := New(context.Background(), s.c)
			if err != nil {
				return err
			}
			if n := len(next.checkpoints); n != 0 {
				return fmt.Errorf("%d sessions", n)
			}
			return errors.Join(errors.New("the old process has ended"), next.Close())
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			s, _ := w.serve(t)
			p, dir := w.pod(t, 1, StateRunning), outputDir(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			w.rt.Fail = func(_ context.Context, m string) error { return tc.fail(w, s, cancel, m) }
			if _, err := s.CheckpointPod(ctx, checkpointRequest(p, dir)); err == nil {
				t.Error("it has not failed")
			}
			if _, err := w.rt.Count(p.Containers[0].ContainerId); err != nil {
				t.Error(err)
			}
			if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
				t.Errorf("%v in the directory, %v", files, err)
			}
			if n := w.sessionsLeft(t, s); n != 0 {
				t.Errorf("%d sessions are left", n)
			}
		})
	}
}

func at(method, want string) error {
	if method == want {
		return errors.New("as told")
	}
	return nil
}

// TestCheckpointPodThaws: a pod that cannot be resumed at once is resumed later.
func TestCheckpointPodThaws(t *testing.T) {
	w := newWorld(t)
	s, _ := w.serve(t)
	p, dir := w.pod(t, 1, StateRunning), outputDir(t)
	w.failAt("Thaw", errors.New("as told"))
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, dir)); err == nil {
		t.Error("a checkpoint whose pod is frozen was a success")
	}
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, dir)); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a second one meanwhile: %v", err)
	}
	w.rt.Fail = nil
	s.collect(t.Context())
	if _, err := w.rt.Count(p.Containers[0].ContainerId); err != nil {
		t.Error(err)
	}
	if n := w.sessionsLeft(t, s); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

// TestRestorePodRefuses: after every failure no pod, no session and no memory is left.
func TestRestorePodRefuses(t *testing.T) {
	w := newWorld(t)
	s, _ := w.serve(t)
	p, whole := w.pod(t, 2, StateRunning), outputDir(t)
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, whole)); err != nil {
		t.Fatal(err)
	}
	changed := func(change func(dir string) error) string {
		t.Helper()
		dir := outputDir(t)
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	edit := func(name string, f func([]byte) []byte) string {
		return changed(func(dir string) error {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, name), f(b), 0o600)
		})
	}
	none := func(*cri.RestorePodRequest) {}
	type testCase struct {
		name   string
		dir    string
		change func(*cri.RestorePodRequest)
		code   codes.Code
	}
	cases := []testCase{
		{"an unknown option", whole, func(q *cri.RestorePodRequest) { q.Options = map[string]string{"x": "y"} }, codes.InvalidArgument},
		{"a volume that the checkpoint lacks", whole, func(q *cri.RestorePodRequest) { q.Options = map[string]string{migration.VolumeOption + "v": whole} }, codes.FailedPrecondition},
		{"no configuration", whole, func(q *cri.RestorePodRequest) { q.Config = nil }, codes.InvalidArgument},
		{"no containers", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs = nil }, codes.InvalidArgument},
		{"a container less", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs = q.ContainerConfigs[1:] }, codes.FailedPrecondition},
		{"a container twice", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs[0].Metadata.Name = "c1" }, codes.InvalidArgument},
		{"another container", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs[0].Metadata.Name = "x" }, codes.FailedPrecondition},
		{"a container without a name", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs[0].Metadata = nil }, codes.InvalidArgument},
		{"an image that is missing", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs[1].Image.Image = "missing" }, codes.NotFound},
		{"another command", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs[1].Args = []string{"x"} }, codes.FailedPrecondition},
		{"another directory", whole, func(q *cri.RestorePodRequest) { q.ContainerConfigs[1].WorkingDir = "/x" }, codes.FailedPrecondition},
		{"another user", whole, func(q *cri.RestorePodRequest) {
			q.ContainerConfigs[1].Linux = &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{RunAsUser: &cri.Int64Value{Value: 1}}}
		}, codes.FailedPrecondition},
		{"another environment", whole, func(q *cri.RestorePodRequest) {
			q.ContainerConfigs[1].Envs = []*cri.KeyValue{{Key: "SECRET", Value: []byte("value")}}
		}, codes.FailedPrecondition},
		{"an unknown handler", whole, func(q *cri.RestorePodRequest) { q.RuntimeHandler = "x" }, codes.Unknown},
		{"a relative path", "x", none, codes.InvalidArgument},
		{"an empty directory", outputDir(t), none, codes.InvalidArgument},
		{"no stream", changed(func(dir string) error { return os.Remove(filepath.Join(dir, podStream)) }), none, codes.InvalidArgument},
		{"no manifest", changed(func(dir string) error { return os.Remove(filepath.Join(dir, podManifest)) }), none, codes.InvalidArgument},
		{"a stream that is a link", changed(func(dir string) error {
			return errors.Join(os.Rename(filepath.Join(dir, podStream), filepath.Join(dir, "x")), os.Symlink("x", filepath.Join(dir, podStream)))
		}), none, codes.InvalidArgument},
		{"a manifest that is a directory", changed(func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, podManifest)), os.Mkdir(filepath.Join(dir, podManifest), 0o700))
		}), none, codes.InvalidArgument},
		{"a stream that is cut off", edit(podStream, func(b []byte) []byte { return b[:len(b)-1] }), none, codes.DataLoss},
		{"a stream that goes on", edit(podStream, func(b []byte) []byte { return append(b, 0) }), none, codes.DataLoss},
		{"a manifest of something else", edit(podManifest, func(b []byte) []byte { return bytes.Replace(b, []byte(`"kernel":"0"`), []byte(`"kernel":"1"`), 1) }), none, codes.DataLoss},
		{"a manifest with more", edit(podManifest, func(b []byte) []byte { return append([]byte(`{"x":1,`), b[1:]...) }), none, codes.DataLoss},
		{"a manifest without end", edit(podManifest, func(b []byte) []byte { return bytes.Repeat([]byte(" "), checkpoint.MaxManifest+1) }), none, codes.DataLoss},
	}
	st, err := os.Stat(filepath.Join(whole, podStream))
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < st.Size(); off += st.Size()/40 + 1 {
		cases = append(cases, testCase{fmt.Sprintf("byte %d changed", off), edit(podStream, func(b []byte) []byte { b[off] ^= 0x40; return b }), none, codes.DataLoss})
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			have := len(w.sandboxes)
			q := restoreRequest(tc.dir, "c0", "c1")
			tc.change(q)
			_, err := s.RestorePod(minute(t), q)
			// A changed name of a part is found when it has no place.
			if got := status.Code(err); got != tc.code {
				t.Errorf("%v", err)
			}
			if err != nil && strings.Contains(err.Error(), "value") && tc.name == "another environment" {
				t.Errorf("the value of a variable is told: %v", err)
			}
			if len(w.sandboxes) != have {
				t.Error("a pod is left")
			}
			if n := w.sessionsLeft(t, s); n != 0 {
				t.Errorf("%d sessions are left", n)
			}
		})
	}
	if _, err := s.RestorePod(t.Context(), restoreRequest(whole, "c0", "c1")); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without a deadline: %v", err)
	}
}

// TestRestorePodCollects: a pod that could not be removed, or whose restore was cut
// off by the end of the process, is removed later; one that nobody starts stays.
func TestRestorePodCollects(t *testing.T) {
	w := newWorld(t)
	s, _ := w.serve(t)
	p, dir := w.pod(t, 1, StateRunning), outputDir(t)
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, dir)); err != nil {
		t.Fatal(err)
	}
	have := len(w.sandboxes)
	w.removing = func() error { return errors.New("as told") }
	bad := restoreRequest(dir, "c0")
	bad.ContainerConfigs[0].Args = []string{"x"}
	if _, err := s.RestorePod(minute(t), bad); status.Code(err) != codes.FailedPrecondition {
		t.Fatal(err)
	}
	for id := range w.containers {
		if strings.HasPrefix(id, "restored") {
			if prepared, err := s.StartContainer(minute(t), id); prepared && err == nil {
				t.Error("a container of a pod that was not restored was started")
			}
		}
	}
	s.Close()
	s, _ = w.serve(t)
	w.removing = nil
	s.collect(t.Context())
	if len(w.sandboxes) != have || w.sessionsLeft(t, s) != 0 {
		t.Errorf("%d pods, %d sessions are left", len(w.sandboxes)-have, w.sessionsLeft(t, s))
	}

	res, err := s.RestorePod(minute(t), restoreRequest(dir, "c0"))
	if err != nil {
		t.Fatal(err)
	}
	s.collect(t.Context())
	if w.sessionsLeft(t, s) == 0 {
		t.Error("a prepared pod has lost its memory")
	}
	if _, err := w.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: res.PodSandboxId}); err != nil {
		t.Fatal(err)
	}
	s.collect(t.Context())
	if n := w.sessionsLeft(t, s); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

// TestStartContainerOnce: the start of a prepared container happens once, and not when
// its caller has gone.
func TestStartContainerOnce(t *testing.T) {
	w := newWorld(t)
	s, _ := w.serve(t)
	p, dir := w.pod(t, 2, StateRunning), outputDir(t)
	if _, err := s.CheckpointPod(minute(t), checkpointRequest(p, dir)); err != nil {
		t.Fatal(err)
	}
	res, err := s.RestorePod(minute(t), restoreRequest(dir, "c0", "c1"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w.starting = func(context.Context) { cancel() }
	id := res.RestoredContainers[0].ContainerId
	if prepared, err := s.StartContainer(ctx, id); !prepared || status.Code(err) != codes.Canceled {
		t.Errorf("%v, %v", prepared, err)
	}
	if c, _ := w.Get(t.Context(), id); c.State != StateExited {
		t.Errorf("container is %s", c.State)
	}
	if prepared, err := s.StartContainer(minute(t), id); !prepared || status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a second start: %v, %v", prepared, err)
	}
	w.starting = nil
	if prepared, err := s.StartContainer(minute(t), res.RestoredContainers[1].ContainerId); !prepared || err != nil {
		t.Errorf("%v, %v", prepared, err)
	}
	if n := w.sessionsLeft(t, s); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}
