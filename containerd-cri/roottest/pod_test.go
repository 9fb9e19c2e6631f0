//go:build root

package roottest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// twoCounters are two containers that count, each with files of its own.
func twoCounters(p *pod) []container {
	data := p.volume("data")
	return []container{
		{name: "a", image: "podmig.test/workload:1", command: serveArgs(10, "/rootfs.txt", "/dev/shm/a.txt"), mounts: []*cri.Mount{data}},
		{name: "b", image: "podmig.test/workload:1", command: serveArgs(3, "/data/b.txt"), mounts: []*cri.Mount{data}},
	}
}

// volumeOptions names the volumes of a pod as CheckpointPod and RestorePod want it.
func volumeOptions(p *pod) map[string]string {
	o := map[string]string{}
	for _, v := range p.volumes {
		o["podmig.dev/volume."+v.Name] = v.HostPath
	}
	return o
}

func counted(t *testing.T, p *pod, names ...string) {
	t.Helper()
	for _, name := range names {
		eventually(t, "counter "+name+" runs", func() error {
			k, err := ask(p, name, "count")
			if err == nil && k < 20 {
				err = fmt.Errorf("%d ticks", k)
			}
			return err
		})
	}
}

func checkpointPod(t *testing.T, p *pod, dir string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := p.n.CheckpointPod(ctx, &cri.CheckpointPodRequest{PodSandboxId: p.id, OutputPath: dir, ContainerIds: []string{p.ids["a"], p.ids["b"]}, Options: volumeOptions(p)})
	return err
}

func restorePod(t *testing.T, p *pod, dir string, cs []container) (*cri.RestorePodResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	q := &cri.RestorePodRequest{CheckpointPath: dir, Config: p.config, Options: volumeOptions(p)}
	for _, c := range cs {
		q.ContainerConfigs = append(q.ContainerConfigs, p.containerConfig(c))
	}
	r, err := p.n.RestorePod(ctx, q)
	if err != nil {
		return nil, err
	}
	p.id = r.PodSandboxId
	for _, c := range r.RestoredContainers {
		p.ids[c.Name] = c.ContainerId
	}
	return r, nil
}

// TestCheckpointPod writes a pod of two containers to a directory, removes it and
// restores it twice, the second time after a restart of containerd in between.
func TestCheckpointPod(t *testing.T) {
	n := start(t)
	src := n.runPod("pod-src")
	for _, c := range twoCounters(src) {
		src.start(c)
	}
	counted(t, src, "a", "b")
	sums := map[string]string{}
	for name := range src.ids {
		sums[name] = src.exec(name, "/workload", "ask", "/s.sock", "sum")
	}
	before, _ := ask(src, "a", "count")
	dir := t.TempDir()
	if err := checkpointPod(t, src, dir); err != nil {
		t.Fatal(err)
	}
	// The source runs on, and the checkpoint is for its owner only.
	at, _ := ask(src, "a", "count")
	eventually(t, "the source runs on", func() error {
		if k, err := ask(src, "a", "count"); err != nil || k <= at {
			return fmt.Errorf("%d ticks after %d, %v", k, at, err)
		}
		return nil
	})
	files, err := os.ReadDir(dir)
	if err != nil || len(files) == 0 {
		t.Fatalf("%v in the directory, %v", files, err)
	}
	for _, f := range files {
		if st, err := f.Info(); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v, %v", f.Name(), st.Mode(), err)
		}
	}
	if err := checkpointPod(t, src, dir); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a second checkpoint in the same directory: %v", err)
	}
	late, _ := ask(src, "a", "count")
	src.remove()
	n.clean()

	for _, restart := range []bool{false, true} {
		dst := n.describePod(fmt.Sprintf("pod-dst-%v", restart))
		cs := twoCounters(dst)
		if _, err := restorePod(t, dst, dir, cs); err != nil {
			t.Fatal(err)
		}
		if restart {
			n.restart()
		}
		for _, name := range []string{"a", "b"} {
			if st := dst.status(name); st.State != cri.ContainerState_CONTAINER_CREATED {
				t.Errorf("container %s is %v before its start", name, st.State)
			}
			if _, err := n.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: dst.ids[name]}); err != nil {
				t.Fatal(err)
			}
			if got := dst.exec(name, "/workload", "ask", "/s.sock", "sum"); got != sums[name] {
				t.Errorf("memory of container %s has changed: %s instead of %s", name, got, sums[name])
			}
		}
		if k, err := ask(dst, "a", "count"); err != nil || k < before {
			t.Errorf("%d ticks after the restore, %d before it, %v", k, before, err)
		} else if k > late+500 {
			t.Errorf("%d ticks after the restore, the source ended with %d", k, late)
		}
		counted(t, dst, "a", "b")
		for name, f := range map[string]string{"a": "/rootfs.txt", "b": "/data/b.txt"} {
			sequence(t, f, strings.Fields(dst.exec(name, "/workload", "cat", f)))
		}
		sequence(t, "/dev/shm/a.txt", strings.Fields(dst.exec("a", "/workload", "cat", "/dev/shm/a.txt")))
		var ticks []string
		for l := range strings.Lines(dst.log("a")) {
			f := strings.Fields(l)
			ticks = append(ticks, f[len(f)-1])
		}
		sequence(t, "log", ticks)
		if _, err := n.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: dst.ids["a"], Timeout: 1}); err != nil {
			t.Error(err)
		}
		if _, err := n.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: dst.ids["a"]}); err == nil {
			t.Error("an exited container was started again")
		}
		dst.remove()
		eventually(t, "nothing is left", func() error {
			if left, _ := os.ReadDir("/run/containerd/io.containerd.grpc.v1.podmig-migration/r"); len(left) != 0 {
				return fmt.Errorf("%d sessions", len(left))
			}
			return nil
		})
		n.clean()
	}
}

// TestCheckpointPodRefuses asks for what must fail, and finds the pod running and
// the directory as it was.
func TestCheckpointPodRefuses(t *testing.T) {
	n := start(t)
	src := n.runPod("pod-refuse")
	for _, c := range twoCounters(src) {
		src.start(c)
	}
	counted(t, src, "a", "b")
	empty, used, file := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "file")
	write(t, filepath.Join(used, "mine"), "x")
	write(t, file, "x")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(empty, link); err != nil {
		t.Fatal(err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*cri.CheckpointPodRequest)
		code   codes.Code
	}{
		{"an unknown option", func(q *cri.CheckpointPodRequest) { q.Options = map[string]string{"compress": "yes"} }, codes.InvalidArgument},
		{"a volume that is none", func(q *cri.CheckpointPodRequest) {
			q.Options = map[string]string{"podmig.dev/volume.data": "/nowhere"}
		}, codes.InvalidArgument},
		{"a directory in use", func(q *cri.CheckpointPodRequest) { q.OutputPath = used }, codes.AlreadyExists},
		{"a relative path", func(q *cri.CheckpointPodRequest) { q.OutputPath = "checkpoint" }, codes.InvalidArgument},
		{"a path with dots", func(q *cri.CheckpointPodRequest) { q.OutputPath = empty + "/../x" }, codes.InvalidArgument},
		{"no directory", func(q *cri.CheckpointPodRequest) { q.OutputPath = empty + "/new" }, codes.InvalidArgument},
		{"a file", func(q *cri.CheckpointPodRequest) { q.OutputPath = file }, codes.InvalidArgument},
		{"a link", func(q *cri.CheckpointPodRequest) { q.OutputPath = link }, codes.InvalidArgument},
		{"a directory for everybody", func(q *cri.CheckpointPodRequest) { q.OutputPath = open }, codes.InvalidArgument},
		{"an unknown container", func(q *cri.CheckpointPodRequest) { q.ContainerIds = append(q.ContainerIds, "0123456789") }, codes.NotFound},
		{"a container twice", func(q *cri.CheckpointPodRequest) { q.ContainerIds = append(q.ContainerIds, q.ContainerIds[0]) }, codes.InvalidArgument},
		{"no container", func(q *cri.CheckpointPodRequest) { q.ContainerIds = nil }, codes.InvalidArgument},
		{"an unknown sandbox", func(q *cri.CheckpointPodRequest) { q.PodSandboxId = "0123456789" }, codes.NotFound},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		q := &cri.CheckpointPodRequest{PodSandboxId: src.id, OutputPath: empty, ContainerIds: []string{src.ids["a"], src.ids["b"]}}
		tc.change(q)
		_, err := n.CheckpointPod(ctx, q)
		cancel()
		if status.Code(err) != tc.code {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	_, err := n.CheckpointPod(t.Context(), &cri.CheckpointPodRequest{PodSandboxId: src.id, OutputPath: empty, ContainerIds: []string{src.ids["a"]}})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("without a deadline: %v", err)
	}
	n.clean()
}

// TestCheckpointPodKilled ends containerd while a checkpoint is written. Afterwards the
// pod runs on, and of the checkpoint nothing is left.
func TestCheckpointPodKilled(t *testing.T) {
	n := start(t)
	src := n.runPod("pod-killed")
	cs := twoCounters(src)
	cs[0].command = serveArgs(300)
	for _, c := range cs {
		src.start(c)
	}
	counted(t, src, "a", "b")
	dir := t.TempDir()
	done := make(chan error)
	go func() { done <- checkpointPod(t, src, dir) }()
	eventually(t, "the checkpoint has begun", func() error {
		_, err := os.Stat(filepath.Join(dir, "checkpoint.stream"))
		return err
	})
	n.restart()
	if err := <-done; err == nil {
		t.Error("the checkpoint was complete before the end of containerd")
	}
	at, err := ask(src, "a", "count")
	if err != nil {
		t.Error(err)
	}
	eventually(t, "the pod runs on", func() error {
		if k, err := ask(src, "a", "count"); err != nil || k <= at {
			return fmt.Errorf("%d ticks after %d, %v", k, at, err)
		}
		return nil
	})
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("%v in the directory, %v", files, err)
	}
	n.clean()
}

// TestRestorePodRefuses asks for restores that must fail, and finds no pod afterwards.
func TestRestorePodRefuses(t *testing.T) {
	n := start(t)
	src := n.runPod("pod-whole")
	for _, c := range twoCounters(src) {
		src.start(c)
	}
	counted(t, src, "a", "b")
	dir := t.TempDir()
	if err := checkpointPod(t, src, dir); err != nil {
		t.Fatal(err)
	}
	pods := func() int {
		t.Helper()
		r, err := n.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return len(r.Items)
	}
	have := pods()
	damaged := t.TempDir()
	if err := os.CopyFS(damaged, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	stream := filepath.Join(damaged, "checkpoint.stream")
	b, err := os.ReadFile(stream)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(stream, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for i, tc := range []struct {
		name   string
		dir    string
		change func(*cri.RestorePodRequest)
		code   codes.Code
	}{
		{"a damaged stream", damaged, func(*cri.RestorePodRequest) {}, codes.DataLoss},
		{"no checkpoint", t.TempDir(), func(*cri.RestorePodRequest) {}, codes.InvalidArgument},
		{"a relative path", "checkpoint", func(*cri.RestorePodRequest) {}, codes.InvalidArgument},
		{"an unknown option", dir, func(q *cri.RestorePodRequest) { q.Options["tcp"] = "close" }, codes.InvalidArgument},
		{"a volume less", dir, func(q *cri.RestorePodRequest) { q.Options = nil }, codes.FailedPrecondition},
		{"an unknown handler", dir, func(q *cri.RestorePodRequest) { q.RuntimeHandler = "kata" }, codes.Unknown},
		{"a container less", dir, func(q *cri.RestorePodRequest) { q.ContainerConfigs = q.ContainerConfigs[:1] }, codes.FailedPrecondition},
		{"another name", dir, func(q *cri.RestorePodRequest) { q.ContainerConfigs[0].Metadata.Name = "c" }, codes.FailedPrecondition},
		{"another command", dir, func(q *cri.RestorePodRequest) { q.ContainerConfigs[0].Command = []string{"/workload"} }, codes.FailedPrecondition},
		{"another environment", dir, func(q *cri.RestorePodRequest) {
			q.ContainerConfigs[1].Envs = []*cri.KeyValue{{Key: "X", Value: []byte("y")}}
		}, codes.FailedPrecondition},
		{"another user", dir, func(q *cri.RestorePodRequest) {
			q.ContainerConfigs[1].Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
		}, codes.FailedPrecondition},
		{"another working directory", dir, func(q *cri.RestorePodRequest) { q.ContainerConfigs[1].WorkingDir = "/data" }, codes.FailedPrecondition},
		{"fewer capabilities", dir, func(q *cri.RestorePodRequest) {
			q.ContainerConfigs[0].Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
		}, codes.FailedPrecondition},
	} {
		dst := n.describePod(fmt.Sprintf("pod-bad%d", i))
		q := &cri.RestorePodRequest{CheckpointPath: tc.dir, Config: dst.config}
		for _, c := range twoCounters(dst) {
			q.ContainerConfigs = append(q.ContainerConfigs, dst.containerConfig(c))
		}
		q.Options = volumeOptions(dst)
		tc.change(q)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		_, err := n.RestorePod(ctx, q)
		cancel()
		if status.Code(err) != tc.code {
			t.Errorf("%s: %v", tc.name, err)
		} else {
			t.Logf("%s: %v", tc.name, err)
		}
	}
	if left := pods(); left != have {
		t.Errorf("%d pods, %d before", left, have)
	}
	n.clean()
}

// TestCheckpointContainer is the CRI's older call, which stays containerd's own.
func TestCheckpointContainer(t *testing.T) {
	n := start(t)
	p := n.runPod("container-checkpoint")
	p.start(container{name: "a", image: "podmig.test/workload:1", command: serveArgs(3)})
	counted(t, p, "a")
	file := filepath.Join(t.TempDir(), "a.tar")
	if _, err := n.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: p.ids["a"], Location: file}); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Size() < 1<<20 {
		t.Errorf("checkpoint: %v, %v", st, err)
	}
	at, _ := ask(p, "a", "count")
	eventually(t, "the container runs on", func() error {
		if k, err := ask(p, "a", "count"); err != nil || k <= at {
			return fmt.Errorf("%d ticks after %d, %v", k, at, err)
		}
		return nil
	})
}
