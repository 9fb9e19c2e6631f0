//go:build root

package roottest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// counter starts a pod with one counting container and its created counterpart.
func counter(t *testing.T, n *node, command ...string) (src, dst *pod) {
	t.Helper()
	src, dst = n.runPod("fail-src"), n.runPod("fail-dst")
	c := container{name: "a", image: "podmig.test/workload:1", command: command}
	src.start(c)
	dst.create(c)
	eventually(t, "the counter runs", func() error {
		_, err := ask(src, "a", "count")
		return err
	})
	return src, dst
}

func counts(t *testing.T, p *pod) {
	t.Helper()
	first := 0
	eventually(t, "the counter counts on", func() error {
		k, err := ask(p, "a", "count")
		if first == 0 {
			first = k
		}
		if err == nil && k == first {
			err = fmt.Errorf("it stays at %d", k)
		}
		return err
	})
}

func finish(t *testing.T, n *node, session string, o migration.Outcome) {
	t.Helper()
	if _, err := n.mig.FinishCheckpoint(t.Context(), &migration.FinishCheckpointRequest{SessionId: session, Outcome: o}); err != nil {
		t.Error(err)
	}
	if _, err := n.mig.FinishRestore(t.Context(), &migration.FinishRestoreRequest{SessionId: session}); err != nil {
		t.Error(err)
	}
}

// record freezes a pod and returns its stream.
func record(t *testing.T, session string, src *pod) []byte {
	t.Helper()
	c, err := src.n.mig.PrepareCheckpoint(t.Context(), checkpointRequest(session, src))
	if err != nil {
		t.Fatal(err)
	}
	in, err := net.Dial("unix", strings.TrimPrefix(c.StreamAddress, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	data := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(in)
		in.Close()
		data <- b
	}()
	_, err = src.n.mig.FreezeCheckpoint(t.Context(), &migration.FreezeCheckpointRequest{SessionId: session})
	b := <-data
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// send gives a stream to the target and returns its verdict.
func send(t *testing.T, session string, dst *pod, stream []byte) error {
	t.Helper()
	r, err := dst.n.mig.PrepareRestore(t.Context(), restoreRequest(session, dst))
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Dial("unix", strings.TrimPrefix(r.StreamAddress, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = out.Write(stream)
	end(out)
	_, err = dst.n.mig.VerifyRestore(t.Context(), &migration.VerifyRestoreRequest{SessionId: session})
	return err
}

// TestDumpFails: what CRIU can not dump is named before the freeze, and by CRIU's
// own words after it.
func TestDumpFails(t *testing.T) {
	n := start(t)
	src, _ := counter(t, n, "/workload", "multipath", "/s.sock", "1")
	r, err := n.mig.PreflightPod(t.Context(), &migration.PreflightPodRequest{PodSandboxId: src.id, ContainerIds: []string{src.ids["a"]}})
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, f := range r.Findings {
		found = found || f.Code == "MPTCP" && f.Severity == migration.Finding_SEVERITY_BLOCKING && f.Fd > 2 && strings.Contains(f.Cure, "multipathtcp=0")
	}
	if !found {
		t.Errorf("preflight found %v", r.Findings)
	}
	c, err := n.mig.PrepareCheckpoint(t.Context(), checkpointRequest("dumpfails", src))
	if err != nil {
		t.Fatal(err)
	}
	in, err := net.Dial("unix", strings.TrimPrefix(c.StreamAddress, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, in) }()
	_, err = n.mig.FreezeCheckpoint(t.Context(), &migration.FreezeCheckpointRequest{SessionId: "dumpfails"})
	if err == nil || !strings.Contains(err.Error(), "criu/sk-inet.c") {
		t.Errorf("freeze: %v", err)
	}
	if _, err := src.tryExec("a", "/workload", "ask", "/s.sock", "count"); err == nil {
		t.Error("the container runs after the failed dump")
	}
	finish(t, n, "dumpfails", migration.Outcome_OUTCOME_RESUME)
	counts(t, src)
	n.clean()
}

// TestSocketBetweenContainers: every container is dumped by itself, so a connection to
// another one of the pod is one to the outside, and is named before the freeze.
func TestSocketBetweenContainers(t *testing.T) {
	n := start(t)
	src := n.runPod("sockets")
	data := src.volume("data")
	c := container{image: "podmig.test/workload:1", mounts: []*cri.Mount{data}}
	c.name, c.command = "hub", []string{"/workload", "hub", "/data/hub.sock", "/s.sock", "1"}
	src.start(c)
	counted(t, src, "hub")
	c.name, c.command = "client", []string{"/workload", "client", "/data/hub.sock", "/s.sock", "1"}
	src.start(c)
	counted(t, src, "client")
	r, err := n.mig.PreflightPod(t.Context(), preflightReq(src))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, f := range r.Findings {
		if f.Code == "UnixSocketOutside" && f.Severity == migration.Finding_SEVERITY_BLOCKING {
			found[f.ContainerId] = true
		}
	}
	if !found[src.ids["hub"]] || !found[src.ids["client"]] {
		t.Errorf("preflight found %v", r.Findings)
	}
	// What CRIU would have said.
	p, err := n.mig.PrepareCheckpoint(t.Context(), checkpointRequest("sockets", src))
	if err != nil {
		t.Fatal(err)
	}
	in, err := net.Dial("unix", strings.TrimPrefix(p.StreamAddress, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, in) }()
	if _, err = n.mig.FreezeCheckpoint(t.Context(), &migration.FreezeCheckpointRequest{SessionId: "sockets"}); err == nil || !strings.Contains(err.Error(), "sk-unix") {
		t.Errorf("freeze: %v", err)
	}
	finish(t, n, "sockets", migration.Outcome_OUTCOME_RESUME)
	counted(t, src, "hub", "client")
	n.clean()
}

// rewrite changes one image of a stream and makes it valid again: a source that
// lies.
type rewrite struct {
	w      *checkpoint.Writer
	change func(p checkpoint.Part, off int64, b []byte) []byte
}

type rewritePart struct {
	*checkpoint.PartWriter
	r *rewrite
	p checkpoint.Part
}

func (r *rewrite) Begin(p checkpoint.Part) (checkpoint.PartSink, error) {
	w, err := r.w.Begin(p)
	return &rewritePart{w, r, p}, err
}
func (r *rewrite) Round(x checkpoint.Round) error { return r.w.Round(x) }
func (p *rewritePart) Data(off int64, b []byte) error {
	return p.PartWriter.Data(off, p.r.change(p.p, off, b))
}
func (p *rewritePart) Pages(round uint32, addr uint64, n uint32, b []byte) error {
	if b == nil {
		return p.ZeroPages(round, addr, n)
	}
	return p.PartWriter.Pages(round, addr, b)
}

func lie(t *testing.T, session string, stream []byte, change func(p checkpoint.Part, off int64, b []byte) []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := checkpoint.NewWriter(&out, session)
	if err != nil {
		t.Fatal(err)
	}
	res, err := checkpoint.Read(bytes.NewReader(stream), session, &rewrite{w, change}, checkpoint.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(res.Manifest); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestRestoreFails: images that verify but that CRIU can not restore. Nothing runs
// afterwards on the target, the error has CRIU's words, and the source goes on.
func TestRestoreFails(t *testing.T) {
	for _, tc := range []struct{ name, image string }{
		{"no process tree", "pstree.img"},
		{"broken registers", "core-1.img"},
		{"broken files", "files.img"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := start(t)
			src, dst := counter(t, n, serveArgs(1)...)
			session := "restorefails " + tc.name
			b := lie(t, session, record(t, session, src), func(p checkpoint.Part, _ int64, b []byte) []byte {
				if p.Name == tc.image {
					return bytes.Repeat([]byte{0xee}, len(b))
				}
				return b
			})
			err := send(t, session, dst, b)
			if err == nil {
				_, err = n.mig.RestoreContainer(t.Context(), &migration.RestoreContainerRequest{SessionId: session, ContainerId: dst.ids["a"]})
				if err == nil || !strings.Contains(err.Error(), "criu/") {
					t.Errorf("restore: %v", err)
				}
				if st := dst.status("a"); st.State != cri.ContainerState_CONTAINER_EXITED {
					t.Errorf("container is %v", st.State)
				}
			}
			t.Log(err)
			noProcess(t, dst.ids["a"])
			finish(t, n, session, migration.Outcome_OUTCOME_RESUME)
			counts(t, src)
			n.clean()
		})
	}
}

// TestOneOfTwoFails: when one container of a pod can not be restored, no process of
// the others has run either.
func TestOneOfTwoFails(t *testing.T) {
	n := start(t)
	src, dst := n.runPod("two-src"), n.runPod("two-dst")
	for _, name := range []string{"a", "b"} {
		c := container{name: name, image: "podmig.test/workload:1", command: []string{"/workload", "serve", "/s.sock", "1", "/dev/shm/" + name}}
		src.start(c)
		dst.create(c)
		eventually(t, name+" runs", func() error {
			_, err := ask(src, name, "count")
			return err
		})
	}
	b := lie(t, "two", record(t, "two", src), func(p checkpoint.Part, _ int64, b []byte) []byte {
		if p.Container == "b" && p.Name == "files.img" {
			return bytes.Repeat([]byte{0xee}, len(b))
		}
		return b
	})
	if err := send(t, "two", dst, b); err != nil {
		t.Fatal(err)
	}
	errs := map[string]chan error{"a": make(chan error, 1), "b": make(chan error, 1)}
	for name, c := range errs {
		go func() {
			_, err := n.mig.RestoreContainer(t.Context(), &migration.RestoreContainerRequest{SessionId: "two", ContainerId: dst.ids[name]})
			c <- err
		}()
	}
	for name, c := range errs {
		if err := <-c; err == nil || !strings.Contains(err.Error(), "criu/image.c") {
			t.Errorf("restore of %s: %v", name, err)
		}
		noProcess(t, dst.ids[name])
	}
	finish(t, n, "two", migration.Outcome_OUTCOME_RESUME)
	counts(t, src)
	n.clean()
}

// TestMoreRights: a checkpoint that verifies but gives its processes more than the
// target's container may.
func TestMoreRights(t *testing.T) {
	n := start(t)
	src := n.runPod("rights-src")
	src.privileged = true
	src.start(container{name: "a", image: "podmig.test/workload:1", command: serveArgs(1)})
	dst := n.runPod("rights-dst")
	dst.create(container{name: "a", image: "podmig.test/workload:1", command: serveArgs(1)})
	eventually(t, "the counter runs", func() error {
		_, err := ask(src, "a", "count")
		return err
	})
	err := send(t, "rights", dst, record(t, "rights", src))
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "more than the container may") {
		t.Errorf("verify: %v", err)
	}
	finish(t, n, "rights", migration.Outcome_OUTCOME_RESUME)
	counts(t, src)
	n.clean()
}

func noProcess(t *testing.T, id string) {
	t.Helper()
	for _, dir := range cgroupsOf(id) {
		if b := readFile(dir + "/cgroup.procs"); len(b) != 0 {
			t.Errorf("processes of container %s exist: %s", id, b)
		}
	}
}

// TestContainerdKilled kills containerd at different instants of a checkpoint. The
// containers are frozen or run on, never half of both, and resume.
func TestContainerdKilled(t *testing.T) {
	for _, after := range []time.Duration{0, 30 * time.Millisecond, 80 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			n := start(t)
			src, dst := counter(t, n, serveArgs(100)...)
			session := "killed " + after.String()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			prepare(t, ctx, session, src, dst)
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = n.mig.FreezeCheckpoint(ctx, &migration.FreezeCheckpointRequest{SessionId: session})
			}()
			select {
			case <-done:
			case <-time.After(after):
			}
			n.restart()
			<-done
			_, err := n.mig.FreezeCheckpoint(ctx, &migration.FreezeCheckpointRequest{SessionId: session})
			if status.Code(err) != codes.FailedPrecondition {
				t.Errorf("a second freeze: %v", err)
			}
			finish(t, n, session, migration.Outcome_OUTCOME_RESUME)
			counts(t, src)
			n.clean()
		})
	}
}

// TestTargetKilled: after the verification the target needs nobody, not even the
// process that received the checkpoint.
func TestTargetKilled(t *testing.T) {
	n := start(t)
	src, dst := counter(t, n, serveArgs(5)...)
	before, err := ask(src, "a", "count")
	if err != nil {
		t.Fatal(err)
	}
	if err := send(t, "target killed", dst, record(t, "target killed", src)); err != nil {
		t.Fatal(err)
	}
	n.restart()
	if st := src.status("a"); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the frozen source is %v", st.State)
	}
	if _, err := src.tryExec("a", "/workload", "ask", "/s.sock", "count"); err == nil {
		t.Error("the source runs after the restart")
	}
	if _, err := n.mig.RestoreContainer(t.Context(), &migration.RestoreContainerRequest{SessionId: "target killed", ContainerId: dst.ids["a"]}); err != nil {
		t.Fatal(err)
	}
	finish(t, n, "target killed", migration.Outcome_OUTCOME_STOP)
	if after, err := ask(dst, "a", "count"); err != nil || after < before {
		t.Errorf("count %d after %d: %v", after, before, err)
	}
	n.clean()
}

// TestThreeContainers moves a pod whose containers share a volume, /dev/shm and the
// IPC namespace, several times in a row.
func TestThreeContainers(t *testing.T) {
	n := start(t)
	make := func(i int) (*pod, []container) {
		p := n.runPod(fmt.Sprintf("three-%d", i))
		data := p.volume("data")
		var cs []container
		for _, name := range []string{"a", "b"} {
			cs = append(cs, container{name: name, image: "podmig.test/workload:1", mounts: []*cri.Mount{data},
				command: append([]string{"/workload", "serve", "/s.sock", "1"}, "/data/"+name, "/dev/shm/"+name, "/own")})
		}
		return p, append(cs, container{name: "c", image: "podmig.test/workload:1", mounts: []*cri.Mount{data}, command: []string{"/workload", "sysv", "/s.sock"}})
	}
	src, cs := make(0)
	for _, c := range cs {
		src.start(c)
		eventually(t, c.name+" runs", func() error {
			_, err := ask(src, c.name, "count")
			return err
		})
	}
	for i := range 3 {
		eventually(t, "the containers have written", func() error {
			for _, name := range []string{"a", "b"} {
				if k, err := ask(src, name, "count"); err != nil || k < 30 {
					return fmt.Errorf("%d ticks: %w", k, err)
				}
			}
			return nil
		})
		shared, err := ask(src, "c", "count")
		if err != nil {
			t.Fatal(err)
		}
		dst, cs := make(i + 1)
		for _, c := range cs {
			dst.create(c)
		}
		move(t, fmt.Sprint("three ", i), src, dst)
		if got, err := ask(dst, "c", "count"); err != nil || got < shared {
			t.Errorf("System V memory counts %d after %d: %v", got, shared, err)
		}
		for _, name := range []string{"a", "b"} {
			for _, f := range []string{"/data/" + name, "/dev/shm/" + name, "/own"} {
				sequence(t, name+f, strings.Fields(dst.exec(name, "/workload", "cat", f)))
			}
		}
		src.remove()
		src = dst
	}
	n.clean()
}
