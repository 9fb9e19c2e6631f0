//go:build root

package roottest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/cri-api/migration/migrationtest"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// move carries the containers of one pod into another and returns what the source
// reported.
func move(t *testing.T, session string, src, dst *pod) *migration.FreezeCheckpointResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	prepare(t, ctx, session, src, dst)
	f, err := src.n.mig.FreezeCheckpoint(ctx, &migration.FreezeCheckpointRequest{SessionId: session})
	if err != nil {
		t.Fatal(err)
	}
	sent := time.Now()
	v, err := dst.n.mig.VerifyRestore(ctx, &migration.VerifyRestoreRequest{SessionId: session})
	verified := time.Now()
	if err != nil {
		t.Fatal(err)
	}
	if v.StreamBytes != f.StreamBytes {
		t.Errorf("sent %d bytes, received %d", f.StreamBytes, v.StreamBytes)
	}
	errs := make(chan error)
	for _, id := range dst.ids {
		go func() {
			_, err := dst.n.mig.RestoreContainer(ctx, &migration.RestoreContainerRequest{SessionId: session, ContainerId: id})
			errs <- err
		}()
	}
	for range dst.ids {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	frozen := time.Unix(0, f.FrozenAt)
	t.Logf("stream of %d bytes; frozen for %v: dump %v, sent after %v, verify %v, restore %v", f.StreamBytes, time.Since(frozen).Round(time.Millisecond),
		time.Duration(f.DumpDuration).Round(time.Millisecond), sent.Sub(frozen).Round(time.Millisecond), verified.Sub(sent).Round(time.Millisecond), time.Since(verified).Round(time.Millisecond))
	if _, err := src.n.mig.FinishCheckpoint(ctx, &migration.FinishCheckpointRequest{SessionId: session, Outcome: migration.Outcome_OUTCOME_STOP}); err != nil {
		t.Fatal(err)
	}
	if _, err := dst.n.mig.FinishRestore(ctx, &migration.FinishRestoreRequest{SessionId: session}); err != nil {
		t.Fatal(err)
	}
	return f
}

// prepare opens both sides of a session, joins their streams and waits for the end of
// the rounds before the freeze.
func prepare(t *testing.T, ctx context.Context, session string, src, dst *pod) {
	t.Helper()
	c, err := src.n.mig.PrepareCheckpoint(ctx, checkpointRequest(session, src))
	if err != nil {
		t.Fatal(err)
	}
	r, err := dst.n.mig.PrepareRestore(ctx, restoreRequest(session, dst))
	if err != nil {
		t.Fatal(err)
	}
	in, err := net.Dial("unix", strings.TrimPrefix(c.StreamAddress, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Dial("unix", strings.TrimPrefix(r.StreamAddress, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.Copy(out, in)
		in.Close()
	}()
	_ = out.SetReadDeadline(time.Now().Add(time.Minute))
	if err := migrationtest.WaitReady(out); err != nil {
		t.Fatalf("the target is not ready: %v", err)
	}
	_ = out.SetReadDeadline(time.Time{})
	go func() {
		<-sent
		end(out)
	}()
}

// end ends the writing of a stream.
func end(out net.Conn) {
	_ = out.(*net.UnixConn).CloseWrite()
	_, _ = io.Copy(io.Discard, out)
	_ = out.Close()
}

func checkpointRequest(session string, src *pod) *migration.PrepareCheckpointRequest {
	r := &migration.PrepareCheckpointRequest{SessionId: session, PodSandboxId: src.id, Volumes: src.volumes, StreamVersion: 1}
	for name, id := range src.ids {
		r.Containers = append(r.Containers, &migration.CheckpointContainer{ContainerId: id, Name: name})
	}
	return r
}

func restoreRequest(session string, dst *pod) *migration.PrepareRestoreRequest {
	r := &migration.PrepareRestoreRequest{SessionId: session, PodSandboxId: dst.id, Volumes: dst.volumes, StreamVersion: 1}
	for name, id := range dst.ids {
		r.Containers = append(r.Containers, &migration.RestoreTarget{ContainerId: id, Name: name})
	}
	return r
}

func serveArgs(mb int, files ...string) []string {
	return append([]string{"/workload", "serve", "/s.sock", strconv.Itoa(mb)}, files...)
}

func ask(p *pod, name, q string) (int, error) {
	s, err := p.tryExec(name, "/workload", "ask", "/s.sock", q)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(s)
}

func TestMoveCounter(t *testing.T) {
	n := start(t)
	src, dst := n.runPod("src"), n.runPod("dst")
	c := container{name: "a", image: "podmig.test/workload:1"}
	c.command, c.mounts = serveArgs(10, "/rootfs.txt", "/data/v.txt", "/dev/shm/m.txt"), []*cri.Mount{src.volume("data")}
	src.start(c)
	eventually(t, "the counter runs", func() error {
		k, err := ask(src, "a", "count")
		if err == nil && k < 20 {
			err = fmt.Errorf("%d ticks", k)
		}
		return err
	})
	sum := src.exec("a", "/workload", "ask", "/s.sock", "sum")
	started := src.status("a").StartedAt
	before, _ := ask(src, "a", "count")

	c.mounts = []*cri.Mount{dst.volume("data")}
	dst.create(c)
	move(t, "counter", src, dst)

	st := dst.status("a")
	if st.State != cri.ContainerState_CONTAINER_RUNNING || st.StartedAt != started {
		t.Errorf("status after the restore: %v, started at %d instead of %d", st.State, st.StartedAt, started)
	}
	after, err := ask(dst, "a", "count")
	if err != nil || after < before {
		t.Errorf("count %d after %d: %v", after, before, err)
	}
	if got := dst.exec("a", "/workload", "ask", "/s.sock", "sum"); got != sum {
		t.Errorf("memory has changed: %s instead of %s", got, sum)
	}
	for _, f := range []string{"/rootfs.txt", "/data/v.txt", "/dev/shm/m.txt"} {
		sequence(t, f, strings.Fields(dst.exec("a", "/workload", "cat", f)))
	}
	var ticks []string
	for _, l := range strings.Split(strings.TrimSpace(dst.log("a")), "\n") {
		f := strings.Fields(l)
		ticks = append(ticks, f[len(f)-1])
	}
	sequence(t, "log", ticks)
	// The restored container is one like any other: it has statistics and stops.
	stats, err := n.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: dst.ids["a"]})
	if err != nil || stats.GetStats().GetMemory().GetWorkingSetBytes().GetValue() == 0 || stats.GetStats().GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
		t.Errorf("statistics after the restore: %v, %v", stats.GetStats(), err)
	}
	if _, err := n.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: dst.ids["a"], Timeout: 1}); err != nil {
		t.Error(err)
	}
	if s := dst.status("a"); s.State != cri.ContainerState_CONTAINER_EXITED {
		t.Errorf("the restored container is %v after its stop", s.State)
	}
	eventually(t, "the source has ended", func() error {
		if s := src.status("a"); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
			return fmt.Errorf("%v, exit code %d", s.State, s.ExitCode)
		}
		return nil
	})
}

// sequence checks that numbers count from 1 without a gap or a repetition.
func sequence(t *testing.T, what string, got []string) {
	t.Helper()
	if len(got) < 20 {
		t.Errorf("%s: only %d entries", what, len(got))
	}
	for i, s := range got {
		if s != strconv.Itoa(i+1) {
			t.Errorf("%s: entry %d is %s", what, i+1, s)
			return
		}
	}
}

// TestMountThroughLink: runc follows the links of an image to where a mount belongs,
// as in every pod with a service account and an image with /var/run.
func TestMountThroughLink(t *testing.T) {
	n := start(t)
	importImage(t, "podmig.test/links:1", map[string]string{"/workload": "/workload", "/run/": "", "/var/run": "->/run"}, []string{"/workload"})
	src, dst := n.runPod("link-src"), n.runPod("link-dst")
	c := container{name: "a", image: "podmig.test/links:1", command: serveArgs(1, "/run/secrets/f")}
	mount := func(p *pod) []*cri.Mount {
		m := p.volume("data")
		m.ContainerPath = "/var/run/secrets"
		return []*cri.Mount{m}
	}
	c.mounts = mount(src)
	src.start(c)
	c.mounts = mount(dst)
	dst.create(c)
	eventually(t, "the counter runs", func() error {
		k, err := ask(src, "a", "count")
		if err == nil && k < 20 {
			err = fmt.Errorf("%d ticks", k)
		}
		return err
	})
	move(t, "link", src, dst)
	sequence(t, "file in the mount", strings.Fields(dst.exec("a", "/workload", "cat", "/var/run/secrets/f")))
	n.clean()
}

// TestMoveRedis is the demonstration: a redis keeps its keys, its identity and its
// uptime.
func TestMoveRedis(t *testing.T) {
	n := start(t)
	if out, err := exec.Command("ctr", "-n", "k8s.io", "images", "import", "/opt/images/redis.tar").CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
	src, dst := n.runPod("redis-src"), n.runPod("redis-dst")
	c := container{name: "redis", image: "podmig.dev/redis:v1", args: []string{"--save", "", "--dir", "/tmp", "--enable-debug-command", "yes"}}
	src.start(c)
	dst.create(c)
	cli := func(p *pod, args ...string) string {
		return p.exec("redis", append([]string{"/usr/bin/redis-cli"}, args...)...)
	}
	eventually(t, "redis answers", func() error {
		_, err := src.tryExec("redis", "/usr/bin/redis-cli", "ping")
		return err
	})
	cli(src, "debug", "populate", "1000000")
	runID := field(cli(src, "info", "server"), "run_id")
	before, _ := strconv.Atoi(field(cli(src, "info", "server"), "uptime_in_seconds"))

	move(t, "redis", src, dst)

	if size := cli(dst, "dbsize"); size != "1000000" {
		t.Errorf("dbsize is %s", size)
	}
	if id := field(cli(dst, "info", "server"), "run_id"); id != runID || id == "" {
		t.Errorf("run_id is %s instead of %s", id, runID)
	}
	if up, _ := strconv.Atoi(field(cli(dst, "info", "server"), "uptime_in_seconds")); up < before {
		t.Errorf("uptime is %d after %d", up, before)
	}
	if got := cli(dst, "get", "key:999999"); got != "value:999999" {
		t.Errorf("key:999999 is %q", got)
	}
	if l := dst.log("redis"); !strings.Contains(l, "Ready to accept connections") {
		t.Errorf("the log of the source is missing:\n%s", l)
	}
}

func field(info, name string) string {
	for _, l := range strings.Split(info, "\n") {
		if v, ok := strings.CutPrefix(strings.TrimSpace(l), name+":"); ok {
			return v
		}
	}
	return ""
}

// TestConformance runs the contract's suite against the real parts.
func TestConformance(t *testing.T) {
	n := start(t)
	pods := map[string]*pod{}
	make := func(t *testing.T, count int, created bool) migrationtest.Pod {
		p := start(t).runPod(fmt.Sprintf("conf%d", len(pods)))
		out := migrationtest.Pod{SandboxID: p.id}
		mounts := []*cri.Mount{p.volume("data")}
		for i := range count {
			c := container{name: fmt.Sprintf("c%d", i), image: "podmig.test/workload:1", command: serveArgs(2, "/data/"+strconv.Itoa(i)), mounts: mounts}
			id := ""
			if created {
				id = p.create(c)
			} else {
				id = p.start(c)
				eventually(t, "the counter runs", func() error {
					_, err := ask(p, c.name, "count")
					return err
				})
			}
			pods[id] = p
			out.Containers = append(out.Containers, &migration.CheckpointContainer{ContainerId: id, Name: c.name})
		}
		out.Volumes = p.volumes
		return out
	}
	migrationtest.Conformance(t, migrationtest.Env{
		Source: n.mig, Target: n.mig,
		RunPod:    func(t *testing.T, n int) migrationtest.Pod { return make(t, n, false) },
		CreatePod: func(t *testing.T, n int) migrationtest.Pod { return make(t, n, true) },
		State: func(t *testing.T, id string) migrationtest.State {
			r, err := n.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
			if err != nil {
				t.Fatal(err)
			}
			return map[cri.ContainerState]migrationtest.State{
				cri.ContainerState_CONTAINER_CREATED: migrationtest.Created,
				cri.ContainerState_CONTAINER_RUNNING: migrationtest.Running,
				cri.ContainerState_CONTAINER_EXITED:  migrationtest.Exited,
			}[r.Status.State]
		},
		Count: func(id string) (int, error) {
			r, err := n.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"/workload", "ask", "/s.sock", "count"}, Timeout: 10})
			if err != nil {
				return 0, err
			}
			return strconv.Atoi(strings.TrimSpace(string(r.Stdout)))
		},
	})
}

// TestMemoryBound moves a gigabyte and watches containerd meanwhile.
func preflightReq(p *pod) *migration.PreflightPodRequest {
	r := &migration.PreflightPodRequest{PodSandboxId: p.id}
	for _, id := range p.ids {
		r.ContainerIds = append(r.ContainerIds, id)
	}
	return r
}

func TestMemoryBound(t *testing.T) {
	n := start(t)
	src, dst := n.runPod("big-src"), n.runPod("big-dst")
	c := container{name: "big", image: "podmig.test/workload:1", command: serveArgs(1024)}
	src.start(c)
	dst.create(c)
	eventually(t, "the process has its memory", func() error {
		_, err := ask(src, "big", "count")
		return err
	})
	sum := src.exec("big", "/workload", "ask", "/s.sock", "sum")
	pid := n.cmd.Process.Pid
	// The kernel keeps the highest value since it was reset.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	before, cpu := memory(t, pid, "VmRSS"), cpuTime(t, pid)

	f := move(t, "big", src, dst)

	if f.StreamBytes < 1<<30 {
		t.Errorf("only %d bytes were sent", f.StreamBytes)
	}
	if f.FinalBytes > 64<<20 {
		t.Errorf("%d bytes were left to the freeze of a process that writes nearly nothing", f.FinalBytes)
	}
	grown := memory(t, pid, "VmHWM") - before
	t.Logf("containerd grew by at most %d KiB over %d KiB and used %v of a processor, both sides together, for a stream of %d MiB", grown, before, cpuTime(t, pid)-cpu, f.StreamBytes>>20)
	if grown > 64<<10 {
		t.Errorf("containerd grew by %d KiB, 64 MiB are allowed", grown)
	}
	if got := dst.exec("big", "/workload", "ask", "/s.sock", "sum"); got != sum {
		t.Errorf("memory has changed: %s instead of %s", got, sum)
	}
}

// TestMoveDirty moves a process that writes, maps and unmaps all the time, there and
// back again.
func TestMoveDirty(t *testing.T) {
	n := start(t)
	from := n.runPod("dirty0")
	c := container{name: "a", image: "podmig.test/workload:1", command: []string{"/workload", "dirty", "/s.sock", "100"}}
	from.start(c)
	before := 0
	for i := range 4 {
		eventually(t, "the process has written", func() error {
			k, err := ask(from, "a", "count")
			if err == nil && k < before+30000 {
				err = fmt.Errorf("%d writes", k)
			}
			return err
		})
		before, _ = ask(from, "a", "count")
		to := n.runPod(fmt.Sprintf("dirty%d", i+1))
		to.create(c)
		f := move(t, fmt.Sprintf("dirty%d", i), from, to)
		if f.FinalBytes > f.StreamBytes/2 {
			t.Errorf("move %d: %d of %d bytes were left to the freeze", i, f.FinalBytes, f.StreamBytes)
		}
		if got := to.exec("a", "/workload", "ask", "/s.sock", "check"); strings.TrimSpace(got) != "whole" {
			t.Fatalf("move %d: %s", i, got)
		}
		if after, err := ask(to, "a", "count"); err != nil || after < before {
			t.Fatalf("move %d: %d writes after %d, %v", i, after, before, err)
		}
		from = to
	}
}

// memory returns a value of /proc/PID/status in KiB.
func memory(t *testing.T, pid int, name string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(field(string(b), name), " kB")))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// cpuTime returns the time a process has used; the kernel counts in hundredths.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')'):]))
	user, _ := strconv.Atoi(f[12])
	system, _ := strconv.Atoi(f[13])
	return time.Duration(user+system) * 10 * time.Millisecond
}
