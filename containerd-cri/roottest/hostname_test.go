//go:build root

package roottest

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pid is the first process of a container, in the node.
func (p *pod) pid(name string) int {
	p.n.t.Helper()
	r, err := p.n.ContainerStatus(p.n.t.Context(), &cri.ContainerStatusRequest{ContainerId: p.ids[name], Verbose: true})
	if err != nil {
		p.n.t.Fatal(err)
	}
	var info struct {
		Pid int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		p.n.t.Fatal(err)
	}
	return info.Pid
}

// sandboxPid is the process that keeps the namespaces of the pod.
func (p *pod) sandboxPid() int {
	p.n.t.Helper()
	r, err := p.n.PodSandboxStatus(p.n.t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		p.n.t.Fatal(err)
	}
	var info struct {
		Pid int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		p.n.t.Fatal(err)
	}
	return info.Pid
}

// TestHostName: the host name is the pod's, not the process's: restored processes see
// that of their new pod, the same as processes that are started there.
func TestHostName(t *testing.T) {
	n := start(t)
	src, dst := n.describePod("name-src"), n.describePod("name-dst")
	src.config.Hostname, dst.config.Hostname = "source", "target"
	src.run()
	dst.run()
	for _, name := range []string{"a", "b"} {
		c := container{name: name, image: "podmig.test/workload:1", command: serveArgs(1)}
		src.start(c)
		dst.create(c)
	}
	counted(t, src, "a", "b")
	if got, err := hostName(src, "a"); err != nil || got != "source" {
		t.Fatalf("host name of the source: %q, %v", got, err)
	}
	move(t, "name", src, dst)
	for _, name := range []string{"a", "b"} {
		if got, err := hostName(dst, name); err != nil || got != "target" {
			t.Errorf("a restored process sees the host name %q, %v", got, err)
		}
		if got := dst.exec(name, "/workload", "cat", "/proc/sys/kernel/hostname"); got != "target" {
			t.Errorf("a new process sees the host name %q", got)
		}
		if got, want := namespace(t, dst.pid(name)), namespace(t, dst.sandboxPid()); got != want {
			t.Errorf("container %s is in %s, its pod in %s", name, got, want)
		}
	}
}

// hostName is what a process that runs for a while sees.
func hostName(p *pod, name string) (string, error) {
	return p.tryExec(name, "/workload", "ask", "/s.sock", "name")
}

func namespace(t *testing.T, pid int) string {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/uts", pid))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}
