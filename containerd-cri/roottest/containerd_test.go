//go:build root

package roottest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

const config = `version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
enable_selinux = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/opt/bin/cni"]
conf_dir = "/etc/cni/net.d"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "podmig.test/workload:1"
`

const cni = `{"cniVersion":"1.0.0","name":"test","plugins":[
{"type":"ptp","ipam":{"type":"host-local","ranges":[[{"subnet":"10.99.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`

// machine is the containerd of this test process. It outlives single tests.
type machine struct {
	cmd  *exec.Cmd
	log  string
	conn *grpc.ClientConn
	cri.RuntimeServiceClient
	mig migration.MigrationServiceClient
}

// node is the machine in the hands of one test.
type node struct {
	t *testing.T
	*machine
}

var theMachine struct {
	sync.Mutex
	*machine
}

// start returns the running containerd, started by the first test that asks.
func start(t *testing.T) *node {
	t.Helper()
	theMachine.Lock()
	defer theMachine.Unlock()
	if theMachine.machine == nil {
		theMachine.machine = &machine{log: "/var/log/containerd.log"}
		// CRIU looks at what the kernel can do through the loopback device.
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("loopback: %v: %s", err, out)
		}
		write(t, "/etc/containerd/config.toml", config)
		write(t, "/etc/cni/net.d/10-test.conflist", cni)
		theMachine.cmd = launch(t, theMachine.log)
		theMachine.connect(t)
		importImage(t, "podmig.test/workload:1", map[string]string{"/workload": "/workload"}, []string{"/workload"})
	}
	n := &node{t: t, machine: theMachine.machine}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(n.log)
			t.Logf("containerd:\n%s", tail(warnings(b), 4000))
		}
	})
	return n
}

func launch(t *testing.T, logFile string) *exec.Cmd {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(logFile), 0o755); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("containerd", "--config", "/etc/containerd/config.toml")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// restart kills containerd without a warning and starts it again.
func (n *node) restart() {
	n.t.Helper()
	if err := n.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		n.t.Fatal(err)
	}
	_ = n.cmd.Wait()
	n.conn.Close()
	n.cmd = launch(n.t, n.log)
	n.connect(n.t)
}

// clean checks that nothing of any session is left.
func (n *node) clean() {
	n.t.Helper()
	for _, side := range []string{"c", "r"} {
		left, _ := os.ReadDir("/run/containerd/io.containerd.grpc.v1.podmig-migration/" + side)
		for _, e := range left {
			n.t.Errorf("a session directory is left: %s/%s", side, e.Name())
		}
	}
	if b, _ := os.ReadFile("/proc/self/mounts"); bytes.Contains(b, []byte("podmig ")) {
		n.t.Errorf("a mount is left:\n%s", b)
	}
	eventually(n.t, "CRIU has ended", func() error {
		procs, _ := filepath.Glob("/proc/[0-9]*/comm")
		for _, p := range procs {
			if b, _ := os.ReadFile(p); string(b) == "criu\n" {
				status, _ := os.ReadFile(filepath.Dir(p) + "/status")
				if !bytes.Contains(status, []byte("zombie")) {
					return fmt.Errorf("process %s", filepath.Base(filepath.Dir(p)))
				}
			}
		}
		return nil
	})
	_ = filepath.WalkDir("/sys/fs/cgroup/freezer/kubepods", func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Name() == "freezer.state" {
			if b, _ := os.ReadFile(p); string(b) != "THAWED\n" {
				n.t.Errorf("%s is %s", p, b)
			}
		}
		return nil
	})
}

func (n *machine) connect(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix:///run/containerd/containerd.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	n.conn = conn
	n.RuntimeServiceClient, n.mig = cri.NewRuntimeServiceClient(conn), migration.NewMigrationServiceClient(conn)
	for {
		r, err := n.Status(ctx, &cri.StatusRequest{}, grpc.WaitForReady(true))
		if err == nil {
			ready := true
			for _, c := range r.Status.Conditions {
				// Other conditions are warnings, about version 1 control groups for one.
				ready = ready && (c.Status || (c.Type != cri.RuntimeReady && c.Type != cri.NetworkReady))
			}
			if ready {
				break
			}
			err = fmt.Errorf("%v", r.Status.Conditions)
		}
		select {
		case <-ctx.Done():
			b, _ := os.ReadFile(n.log)
			t.Fatalf("containerd is not ready: %v\n%s", err, tail(b, 4000))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// warnings leaves out the lines of a log that only say that all is well.
func warnings(b []byte) []byte {
	var out []byte
	for line := range bytes.Lines(b) {
		if !bytes.Contains(line, []byte("level=info")) {
			out = append(out, line...)
		}
	}
	return out
}

func tail(b []byte, n int) string {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return string(b)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// importImage makes an image of files of the node and imports it. Names that end in
// a slash become empty directories, contents that begin with an arrow links.
func importImage(t *testing.T, ref string, files map[string]string, entrypoint []string) {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	dirs := map[string]bool{}
	add := func(h *tar.Header, b []byte) {
		h.Name = strings.TrimPrefix(h.Name, "/")
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	mkdir := func(d string) {
		if d != "/" && !dirs[d] {
			dirs[d] = true
			add(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o777}, nil)
		}
	}
	for dst, src := range files {
		parts := strings.Split(filepath.Dir(dst), "/")
		for i := range parts {
			mkdir("/" + strings.Join(parts[1:i+1], "/"))
		}
		if target, ok := strings.CutPrefix(src, "->"); ok {
			add(&tar.Header{Name: dst, Typeflag: tar.TypeSymlink, Linkname: target}, nil)
			continue
		}
		if src == "" {
			mkdir(strings.TrimSuffix(dst, "/"))
			continue
		}
		b, err := os.ReadFile(src)
		if err != nil {
			t.Fatal(err)
		}
		add(&tar.Header{Name: dst, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(b))}, b)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	conf, _ := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Entrypoint": entrypoint},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + sum(layer.Bytes())}},
	})
	manifest, _ := json.Marshal([]map[string]any{{"Config": sum(conf) + ".json", "RepoTags": []string{ref}, "Layers": []string{"layer.tar"}}})
	file := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w = tar.NewWriter(f)
	add(&tar.Header{Name: "layer.tar", Mode: 0o644, Size: int64(layer.Len())}, layer.Bytes())
	add(&tar.Header{Name: sum(conf) + ".json", Mode: 0o644, Size: int64(len(conf))}, conf)
	add(&tar.Header{Name: "manifest.json", Mode: 0o644, Size: int64(len(manifest))}, manifest)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("ctr", "-n", "k8s.io", "images", "import", file).CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
}

// pod is a sandbox with containers.
type pod struct {
	n       *node
	id      string
	dir     string
	config  *cri.PodSandboxConfig
	volumes []*migration.Volume
	ids     map[string]string
	// privileged gives containers started from now on every capability.
	privileged bool
}

type container struct {
	name, image string
	command     []string
	args        []string
	tty         bool
	mounts      []*cri.Mount
}

// describePod describes a sandbox that does not exist yet.
func (n *node) describePod(name string) *pod {
	n.t.Helper()
	p := &pod{n: n, dir: n.t.TempDir(), ids: map[string]string{}}
	p.config = &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name + "-" + filepath.Base(filepath.Dir(p.dir)) + filepath.Base(p.dir), Namespace: "default"},
		LogDirectory: p.dir + "/logs",
		Hostname:     "moved",
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    "/kubepods/" + name,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}},
		},
	}
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { p.remove() })
	return p
}

// runPod starts a sandbox.
func (n *node) runPod(name string) *pod {
	n.t.Helper()
	p := n.describePod(name)
	p.run()
	return p
}

func (p *pod) run() {
	p.n.t.Helper()
	r, err := p.n.RunPodSandbox(p.n.t.Context(), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		p.n.t.Fatal(err)
	}
	p.id = r.PodSandboxId
}

func (p *pod) remove() {
	if p.id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := p.n.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.n.t.Error(err)
	}
	if _, err := p.n.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.n.t.Error(err)
	}
	p.id = ""
}

// volume makes an emptyDir.
func (p *pod) volume(name string) *cri.Mount {
	p.n.t.Helper()
	dir := filepath.Join(p.dir, "volumes", name)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		p.n.t.Fatal(err)
	}
	p.volumes = append(p.volumes, &migration.Volume{Name: name, HostPath: dir})
	return &cri.Mount{ContainerPath: "/" + name, HostPath: dir}
}

func (p *pod) containerConfig(c container) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: c.name}, Image: &cri.ImageSpec{Image: c.image}, Command: c.command, Args: c.args,
		LogPath: c.name + ".log", Mounts: c.mounts, Tty: c.tty,
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			Capabilities:     p.capabilities(),
			MaskedPaths:      []string{"/proc/kcore", "/proc/keys", "/sys/firmware"},
			ReadonlyPaths:    []string{"/proc/sys", "/proc/bus"},
		}},
	}
}

func (p *pod) create(c container) string {
	p.n.t.Helper()
	r, err := p.n.CreateContainer(p.n.t.Context(), &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: p.containerConfig(c)})
	if err != nil {
		p.n.t.Fatal(err)
	}
	p.ids[c.name] = r.ContainerId
	return r.ContainerId
}

func (p *pod) capabilities() *cri.Capability {
	if p.privileged {
		return &cri.Capability{AddCapabilities: []string{"SYS_ADMIN", "NET_ADMIN"}}
	}
	return nil
}

func (p *pod) start(c container) string {
	p.n.t.Helper()
	id := p.create(c)
	if _, err := p.n.StartContainer(p.n.t.Context(), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		p.n.t.Fatal(err)
	}
	return id
}

func (p *pod) status(name string) *cri.ContainerStatus {
	p.n.t.Helper()
	r, err := p.n.ContainerStatus(p.n.t.Context(), &cri.ContainerStatusRequest{ContainerId: p.ids[name]})
	if err != nil {
		p.n.t.Fatal(err)
	}
	return r.Status
}

// exec runs a command in a container and returns its output.
func (p *pod) exec(name string, command ...string) string {
	p.n.t.Helper()
	out, err := p.tryExec(name, command...)
	if err != nil {
		p.n.t.Fatal(err)
	}
	return out
}

func (p *pod) tryExec(name string, command ...string) (string, error) {
	r, err := p.n.ExecSync(p.n.t.Context(), &cri.ExecSyncRequest{ContainerId: p.ids[name], Cmd: command, Timeout: 60})
	if err != nil {
		return "", fmt.Errorf("exec %v: %w", command, err)
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("exec %v: exit code %d: %s%s", command, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout)), nil
}

func (p *pod) log(name string) string {
	p.n.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.config.LogDirectory, name+".log"))
	if err != nil {
		p.n.t.Fatal(err)
	}
	return string(b)
}

// cgroupsOf returns the control groups of a container.
func cgroupsOf(id string) []string {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/kubepods/*/" + id, "/sys/fs/cgroup/kubepods/*/" + id} {
		dirs, _ := filepath.Glob(pattern)
		out = append(out, dirs...)
	}
	return out
}

func readFile(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

// eventually waits for a condition that has no event.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
