//go:build root

package cluster

// These tests make real clusters and need root, the binaries, the node image and the images pause and counter. They show that a
// cluster works and that nothing of it remains, whenever it ends; they say nothing about migration.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cgroup"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// upVariable makes this test binary bring a cluster up and nothing else, so that a test can kill it in the middle.
const upVariable = "CLUSTER_TEST_UP"

func TestMain(m *testing.M) {
	machine, err := netns.Main(os.Args)
	if dir := os.Getenv(upVariable); !machine && dir != "" {
		_, err = Up(context.Background(), options(filepath.Base(dir), dir, 2))
	} else if !machine {
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func options(name, dir string, nodes int) Options {
	const build = "../../.build"
	return Options{
		Name: name, Dir: dir, Bin: build + "/bin", RootFS: build + "/image/rootfs", Nodes: nodes, ProxyMode: "nftables",
		Images:   []string{build + "/images/pause.tar", build + "/images/counter.tar", build + "/images/coredns.tar"},
		Progress: os.Stdout,
	}
}

// newFolder names a cluster after the process, so that tests do not meet other clusters of the machine.
func newFolder(t *testing.T, suffix string) string {
	t.Helper()
	return filepath.Join(t.TempDir(), fmt.Sprintf("test-%d-%s", os.Getpid(), suffix))
}

// traces is what a cluster leaves in the kernel while it runs.
type traces struct {
	processes  []int
	namespaces []string
}

func tracesOf(t *testing.T, name, dir string) traces {
	t.Helper()
	layout, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	pids, err := layout.PIDs(cgroupOf(name, dir))
	if err != nil {
		t.Fatal(err)
	}
	found := traces{processes: pids}
	own := namespacesOf("self")
	for _, pid := range pids {
		for _, ns := range namespacesOf(fmt.Sprint(pid)) {
			if !slices.Contains(own, ns) && !slices.Contains(found.namespaces, ns) {
				found.namespaces = append(found.namespaces, ns)
			}
		}
	}
	return found
}

func namespacesOf(process string) []string {
	var all []string
	for _, kind := range []string{"net", "mnt", "pid", "uts", "ipc", "cgroup"} {
		if ns, err := os.Readlink("/proc/" + process + "/ns/" + kind); err == nil {
			all = append(all, ns)
		}
	}
	return all
}

// gone tells whether no process is in one of the namespaces or names the cluster's folder.
func (l traces) gone(dir string) error {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, process := range processes {
		for _, ns := range namespacesOf(filepath.Base(process)) {
			if slices.Contains(l.namespaces, ns) {
				return fmt.Errorf("process %s keeps %s", process, ns)
			}
		}
		arguments, err := os.ReadFile(process + "/cmdline")
		if err == nil && strings.Contains(string(arguments), dir) {
			return fmt.Errorf("process %s is left: %q", process, arguments)
		}
	}
	return nil
}

// host is what of the host a cluster must not change.
func host(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	all.Write(mounts)
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range interfaces {
		addresses, err := one.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&all, one.Index, one.Name, addresses)
	}
	routes, err := os.ReadFile("/proc/net/route")
	if err != nil {
		t.Fatal(err)
	}
	all.Write(routes)
	return all.String()
}

// expectNothing fails when anything of the cluster is left.
func expectNothing(t *testing.T, name, dir, before string, left traces) {
	t.Helper()
	layout, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if layout.Exists(cgroupOf(name, dir)) {
		t.Error("control groups are left")
	}
	for _, path := range []string{dir, lockPath(dir)} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	// The last parent of all, the host's first process, buries the dead when it gets to it.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := poll(ctx, func() error { return left.gone(dir) }); err != nil {
		t.Error(err)
	}
	if after := host(t); after != before {
		t.Errorf("the host has changed.\nBefore:\n%s\nAfter:\n%s", before, after)
	}
	if err := Down(t.Context(), name, dir); err != nil {
		t.Errorf("taking down what is down: %v", err)
	}
}

const pod = `
apiVersion: v1
kind: Pod
metadata: {name: counter, labels: {app: counter}}
spec:
  nodeName: node2
  containers:
  - name: counter
    image: podmig.dev/counter:v1
    readinessProbe: {httpGet: {path: /status, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: counter}
spec:
  selector: {app: counter}
  ports: [{port: 80, targetPort: 8080}]
`

func TestCluster(t *testing.T) {
	dir := newFolder(t, "whole")
	name := filepath.Base(dir)
	before := host(t)
	t.Cleanup(func() { _ = Down(context.Background(), name, dir) })
	c, err := Up(t.Context(), options(name, dir, 2))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("a pod runs", func(t *testing.T) { testPod(t, c) })
	t.Run("strangers stay out", func(t *testing.T) { testSecurity(t, c) })
	t.Run("a killed component comes back alone", func(t *testing.T) { testKill(t, c) })
	t.Run("a cable can be pulled", func(t *testing.T) { testLink(t, c) })
	t.Run("a node joins", func(t *testing.T) { testAddNode(t, c) })
	t.Run("a second start is refused", func(t *testing.T) {
		if _, err := Up(t.Context(), options(name, dir, 1)); err == nil || !strings.Contains(err.Error(), "exists") {
			t.Errorf("got %v", err)
		}
	})
	left := tracesOf(t, name, dir)
	if len(left.processes) < 10 || len(left.namespaces) < 3*6 {
		t.Fatalf("the cluster has only %d processes and %d namespaces", len(left.processes), len(left.namespaces))
	}
	if err := Down(t.Context(), name, dir); err != nil {
		t.Fatal(err)
	}
	expectNothing(t, name, dir, before, left)
}

func kubectl(t *testing.T, c *Cluster, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var out strings.Builder
	if err := c.Kubectl(ctx, supervisor.Command{Args: args, Stdout: &out, Stderr: &out}); err != nil {
		t.Fatalf("kubectl %v: %v: %s", args, err, &out)
	}
	return strings.TrimSpace(out.String())
}

func testPod(t *testing.T, c *Cluster) {
	if err := c.Apply(t.Context(), []byte(pod)); err != nil {
		t.Fatal(err)
	}
	kubectl(t, c, "wait", "pod/counter", "--for=condition=Ready", "--timeout=60s")
	// A container is ready before its first tick.
	wait, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	err := poll(wait, func() error {
		if logs := kubectl(t, c, "logs", "counter"); !strings.Contains(logs, "tick 1 at") {
			return fmt.Errorf("unexpected log %q", logs)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	// From a node, through kube-proxy and with a name of the cluster's DNS: the name server's address is a service too.
	address := kubectl(t, c, "get", "service", "counter", "--output=jsonpath={.spec.clusterIP}")
	m, err := c.Machine("node1")
	if err != nil {
		t.Fatal(err)
	}
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return m.Dial(ctx, network, netJoin(dnsService.String(), "53"))
	}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = poll(ctx, func() error {
		found, err := resolver.LookupHost(ctx, "counter.default.svc."+domain+".")
		if err == nil && !slices.Contains(found, address) {
			err = fmt.Errorf("found %v, want %s", found, address)
		}
		return err
	})
	if err != nil {
		t.Errorf("cluster DNS: %v", err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: m.Dial}, Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	err = poll(ctx, func() error {
		answer, err := client.Get("http://" + netJoin(address, "80") + "/status")
		if err == nil {
			answer.Body.Close()
		}
		return err
	})
	if err != nil {
		t.Errorf("service: %v", err)
	}
}

func netJoin(host, port string) string { return net.JoinHostPort(host, port) }

// testSecurity asks node2's kubelet from node1.
func testSecurity(t *testing.T, c *Cluster) {
	node1, err := c.Machine("node1")
	if err != nil {
		t.Fatal(err)
	}
	ca, err := c.loadCA("ca")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca.Cert)
	there, err := planNode(2)
	if err != nil {
		t.Fatal(err)
	}
	// The kubelet's serving certificate of node1 is a server's; its client identity is in its kubeconfig, of which this is the
	// same kind.
	identity, err := ca.Issue(nodeIdentity("node1"))
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(identity.Cert, identity.Key)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		config *tls.Config
		status int // Zero: no connection.
	}{
		{"without a certificate", &tls.Config{RootCAs: roots}, http.StatusUnauthorized},
		{"as a node, what nodes may not", &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}}, http.StatusForbidden},
		{"with another authority", &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{certificate}}, 0},
		{"under another name", &tls.Config{RootCAs: roots, ServerName: "node1"}, 0},
		{"under its name", &tls.Config{RootCAs: roots, ServerName: "node2"}, http.StatusUnauthorized},
	} {
		t.Run(test.name, func(t *testing.T) {
			client := http.Client{Transport: &http.Transport{DialContext: node1.Dial, TLSClientConfig: test.config}, Timeout: 10 * time.Second}
			defer client.CloseIdleConnections()
			answer, err := client.Get("https://" + netJoin(there.address.String(), "10250") + "/pods")
			switch {
			case err == nil:
				answer.Body.Close()
				if answer.StatusCode != test.status {
					t.Errorf("got %s, want %d", answer.Status, test.status)
				}
			case test.status != 0:
				t.Errorf("got %v, want %d", err, test.status)
			}
		})
	}
	if out := kubectl(t, c, "auth", "can-i", "create", "nodes", "--subresource=migration", "--as=system:node:node1", "--as-group=system:nodes"); !strings.HasSuffix(out, "yes") {
		t.Errorf("nodes may not migrate: %s", out)
	}
	var out strings.Builder
	err = c.Kubectl(t.Context(), supervisor.Command{
		Args:   []string{"auth", "can-i", "create", "nodes", "--subresource=migration", "--as=somebody"},
		Stdout: &out, Stderr: &out,
	})
	if err == nil {
		t.Errorf("everybody may migrate: %s", &out)
	}
}

func testKill(t *testing.T, c *Cluster) {
	machine, err := c.Machine("node2")
	if err != nil {
		t.Fatal(err)
	}
	client := machine.Supervisor()
	kubelet, err := c.ComponentPID(t.Context(), "node2", Kubelet)
	if err != nil {
		t.Fatal(err)
	}
	containerd, err := c.ComponentPID(t.Context(), "node2", Containerd)
	if err != nil {
		t.Fatal(err)
	}
	container := kubectl(t, c, "get", "pod", "counter", "--output=jsonpath={.status.containerStatuses[0].containerID}")
	if err := client.Kill(t.Context(), Containerd, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = poll(ctx, func() error {
		pid, err := c.ComponentPID(ctx, "node2", Containerd)
		if err == nil && pid == containerd {
			err = errors.New("containerd has not ended")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := c.ComponentPID(t.Context(), "node2", Kubelet); err != nil || pid != kubelet {
		t.Errorf("kubelet was %d and is %d: %v", kubelet, pid, err)
	}
	if after := kubectl(t, c, "get", "pod", "counter", "--output=jsonpath={.status.containerStatuses[0].containerID}"); after != container {
		t.Errorf("container %s has become %s", container, after)
	}
	if err := client.Stop(t.Context(), Kubelet); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ComponentPID(t.Context(), "node2", Kubelet); err == nil {
		t.Error("the stopped kubelet runs")
	}
	if err := client.Start(t.Context(), Kubelet); err != nil {
		t.Fatal(err)
	}
	if err := c.waitNodes(t.Context(), []string{"node2"}); err != nil {
		t.Error(err)
	}
}

func testLink(t *testing.T, c *Cluster) {
	there, err := planNode(2)
	if err != nil {
		t.Fatal(err)
	}
	node1, err := c.Machine("node1")
	if err != nil {
		t.Fatal(err)
	}
	dial := func(from netns.Machine) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		conn, err := from.Dial(ctx, "tcp", netJoin(there.address.String(), "10250"))
		if err != nil {
			return err
		}
		return conn.Close()
	}
	reachable := func(from netns.Machine) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := poll(ctx, func() error { return dial(from) }); err != nil {
			t.Errorf("node2 is not reached from %s: %v", from.Name, err)
		}
	}
	unreachable := func(from netns.Machine) {
		t.Helper()
		if err := dial(from); err == nil {
			t.Errorf("node2 is reached from %s", from.Name)
		}
	}
	for _, step := range []struct {
		change     func() error
		hub, node1 func(netns.Machine)
	}{
		{func() error { return c.SetLink("node2", false) }, unreachable, unreachable},
		{func() error { return c.SetLink("node2", true) }, reachable, reachable},
		{func() error { return c.SetLinkBetween("node1", "node2", false) }, reachable, unreachable},
		{func() error { return c.SetLinkBetween("node1", "node2", true) }, reachable, reachable},
	} {
		if err := step.change(); err != nil {
			t.Fatal(err)
		}
		step.hub(c.Hub())
		step.node1(node1)
	}
}

func testAddNode(t *testing.T, c *Cluster) {
	name, err := c.AddNode(t.Context(), os.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	if name != "node3" {
		t.Errorf("the node is called %s", name)
	}
	loaded, err := Load(c.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if names := loaded.NodeNames(); !slices.Equal(names, []string{"node1", "node2", "node3"}) {
		t.Errorf("nodes %v", names)
	}
}

// TestKilledUp kills Up at several moments and takes down what it has made until then.
func TestKilledUp(t *testing.T) {
	for _, test := range []struct{ name, appears string }{
		{"before anything runs", stateFile},
		{"while the control plane starts", "machines/hub/spec.json"},
		{"when the control plane runs", "machines/hub/init.pid"},
		{"while nodes start", "machines/node1/spec.json"},
		{"when a node runs", "machines/node2/control.sock"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := newFolder(t, "killed")
			name := filepath.Base(dir)
			before := host(t)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), upVariable+"="+dir)
			cmd.Stderr = os.Stderr
			t.Cleanup(func() { _ = Down(context.Background(), name, dir) })
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			waited := poll(ctx, func() error {
				_, err := os.Lstat(filepath.Join(dir, test.appears))
				return err
			})
			err := errors.Join(waited, cmd.Process.Kill())
			// Its locks are free when it is gone entirely. That it was killed is no news.
			_ = cmd.Wait()
			if err != nil {
				t.Fatal(err)
			}
			left := tracesOf(t, name, dir)
			if err := Down(t.Context(), name, dir); err != nil {
				t.Fatal(err)
			}
			expectNothing(t, name, dir, before, left)
		})
	}
}
