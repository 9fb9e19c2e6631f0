//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/pki"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/tools/clone"
)

// inNode runs a shell script in a node.
func inNode(ctx context.Context, t *testing.T, node, script string) string {
	t.Helper()
	var out bytes.Buffer
	err := admin.Cluster.Run(ctx, node, supervisor.Command{Args: []string{"sh", "-ec", script}, Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatalf("on %s: %s: %v: %s", node, script, err, out.String())
	}
	return strings.TrimSpace(out.String())
}

// restart ends a component, which the node's supervisor starts again, and waits until
// it serves.
func restart(ctx context.Context, t *testing.T, node, component string) {
	t.Helper()
	m, err := admin.Cluster.Machine(node)
	if err != nil {
		t.Fatal(err)
	}
	old, err := admin.Cluster.ComponentPID(ctx, node, component)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Supervisor().Kill(ctx, component, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, component+" runs again on "+node, func() error {
		now, err := admin.Cluster.ComponentPID(ctx, node, component)
		if err == nil && now == old {
			err = errors.New("it has not ended")
		}
		return err
	})
	if component == cluster.Containerd {
		until(ctx, t, "containerd serves on "+node, func() error {
			return admin.Cluster.Run(ctx, node, supervisor.Command{Args: []string{"ctr", "version"}, Stdout: io.Discard, Stderr: io.Discard})
		})
		return
	}
	address := kubeletAddress(ctx, t, node)
	until(ctx, t, "the kubelet serves on "+node, func() error {
		c, err := hubDial(ctx, "tcp", address)
		if err == nil {
			err = c.Close()
		}
		return err
	})
}

// change does something to a node and has it undone when the test ends, also a test
// that was interrupted by its deadline.
func change(ctx context.Context, t *testing.T, node, do, undo string, components ...string) (back func()) {
	t.Helper()
	done := false
	back = func() {
		if done {
			return
		}
		done = true
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		inNode(ctx, t, node, undo)
		for _, c := range components {
			restart(ctx, t, node, c)
		}
	}
	t.Cleanup(back)
	inNode(ctx, t, node, do)
	for _, c := range components {
		restart(ctx, t, node, c)
	}
	return back
}

// cover shows other content in the place of a file until it is uncovered.
func cover(path, with string) (do, undo string) {
	return fmt.Sprintf("mount --bind %s %s", with, path), "umount --lazy " + path
}

// A target that lacks what the processes need does not get them.
func TestTargetsThatCannotTakeThePodAreRefused(t *testing.T) {
	ctx, k := begin(t, 100*time.Second)
	p := start(ctx, t, k, "counter-0", counterPod(""))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")

	t.Run("too little memory", func(t *testing.T) {
		do, undo := cover("/proc/meminfo", "/run/meminfo")
		back := change(ctx, t, node2, "sed 's/^MemAvailable:.*/MemAvailable: 1024 kB/' /proc/meminfo >/run/meminfo; "+do, undo)
		refused(ctx, t, k, p.Name, "c-memory", node2, []string{"the pod needs", "node node2 has 1 MiB", "choose a target with more free memory"})
		back()
		undisturbed(ctx, t, k, p, before)
	})
	t.Run("CPU feature", func(t *testing.T) {
		do, undo := cover("/proc/cpuinfo", "/run/cpuinfo")
		feature := cpuFlags()[0]
		back := change(ctx, t, node2, fmt.Sprintf("sed -E '/^(flags|Features)/s/ %s( |$)/ /' /proc/cpuinfo >/run/cpuinfo; ", feature)+do, undo, cluster.Containerd)
		refused(ctx, t, k, p.Name, "c-cpu", node2, []string{"the CPU of node node2 lacks " + feature, "choose a target whose CPU has every feature of the source's"})
		back()
		undisturbed(ctx, t, k, p, before)
	})
	t.Run("runtime without the extension", func(t *testing.T) {
		do, undo := cover("/usr/local/bin/containerd", "/usr/local/bin/upstream/containerd")
		back := change(ctx, t, node2, do, undo, cluster.Containerd)
		refused(ctx, t, k, p.Name, "c-runtime", node2, []string{"the container runtime of node node2 cannot move pods", "run a containerd with the migration service on both nodes"})
		back()
		undisturbed(ctx, t, k, p, before)
	})
	t.Run("no CRIU", func(t *testing.T) {
		criu := inNode(ctx, t, node2, "command -v criu")
		do, undo := cover(criu, "/run/nothing")
		back := change(ctx, t, node2, ": >/run/nothing; "+do, undo, cluster.Containerd)
		refused(ctx, t, k, p.Name, "c-criu", node2, []string{"there is no CRIU on node node2", "install CRIU on both nodes"})
		back()
		undisturbed(ctx, t, k, p, before)
	})
	t.Run("gate off", func(t *testing.T) {
		back := change(ctx, t, node2, gateOff, gateOn, cluster.Kubelet)
		nodeDeclares(ctx, t, k, false)
		const words = `node "node2" cannot take over pods: its status does not declare the feature PodMigration`
		denied(t, k.Clone(ctx, p.Name, clone.Options{Name: "c-created", Node: node2}, bindTo(node2)), words)
		// The scheduler does not choose it; who does so in its place is refused.
		if err := k.Clone(ctx, p.Name, clone.Options{Name: "c-gate", Node: node2}); err != nil {
			t.Fatal(err)
		}
		if _, err := k.WaitPod(ctx, "c-gate", "unschedulable", func(p *v1.Pod) (bool, error) {
			c := kit.Condition(p, string(v1.PodScheduled))
			return c != nil && c.Reason == v1.PodReasonUnschedulable && strings.Contains(c.Message, "didn't match Pod's required features"), nil
		}); err != nil {
			t.Fatal(err)
		}
		denied(t, k.Client.CoreV1().Pods(k.Namespace).Bind(ctx, &v1.Binding{
			ObjectMeta: metav1.ObjectMeta{Name: "c-gate"}, Target: v1.ObjectReference{Kind: "Node", Name: node2},
		}, metav1.CreateOptions{}), words)
		undisturbed(ctx, t, k, p, before)

		// A gate can be switched off after the clone was bound: then the kubelet refuses it.
		setNodeStatus(ctx, t, k, node2, `{"declaredFeatures": ["PodMigration"]}`)
		expectRefusal(ctx, t, k, "c-gate", []string{"PodMigration is switched off on node node2", "switch the feature gate PodMigration on there"})
		undisturbed(ctx, t, k, p, before)
		back()
		nodeDeclares(ctx, t, k, true)
	})
	// Nothing of all this has done the pod any harm.
	p = move(ctx, t, k, p.Name, "counter-9", node2)
	if after := getJSON[counterState](ctx, t, p, 8080, "/status"); after.PID != before.PID || !after.Started.Equal(before.Started) {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// nodeDeclares waits until the kubelet of node2 has said whether it can move pods.
func nodeDeclares(ctx context.Context, t *testing.T, k *kit.Kit, want bool) {
	t.Helper()
	until(ctx, t, fmt.Sprintf("%s declares the feature: %t", node2, want), func() error {
		n, err := k.Client.CoreV1().Nodes().Get(ctx, node2, metav1.GetOptions{})
		if err == nil && slices.Contains(n.Status.DeclaredFeatures, "PodMigration") != want {
			err = fmt.Errorf("it declares %v", n.Status.DeclaredFeatures)
		}
		return err
	})
}

// The gate of a kubelet is in its configuration.
const (
	gateOff = `cp /etc/kubernetes/kubelet.yaml /run/kubelet.yaml; grep -q 'PodMigration: true' /etc/kubernetes/kubelet.yaml; sed -i 's/PodMigration: true/PodMigration: false/' /etc/kubernetes/kubelet.yaml`
	gateOn  = `cp /run/kubelet.yaml /etc/kubernetes/kubelet.yaml`
)

// The same on the other side: a source that cannot give a pod away says so.
func TestSourcesThatCannotGiveThePodAreRefused(t *testing.T) {
	ctx, k := begin(t, 100*time.Second)
	onNode2 := func(name string) string {
		return strings.NewReplacer("counter-0", name, "nodeName: node1", "nodeName: node2").Replace(counterPod(""))
	}
	t.Run("runtime without the extension", func(t *testing.T) {
		do, undo := cover("/usr/local/bin/containerd", "/usr/local/bin/upstream/containerd")
		back := change(ctx, t, node2, do, undo, cluster.Containerd)
		p := start(ctx, t, k, "counter-1", onNode2("counter-1"))
		before := getJSON[counterState](ctx, t, p, 8080, "/status")
		refused(ctx, t, k, p.Name, "c-runtime", node1, []string{"the container runtime of node node2 cannot move pods", "run a containerd with the migration service on both nodes"})
		undisturbed(ctx, t, k, p, before)
		// With another runtime that knows the pod's containers it can be moved.
		back()
		p = move(ctx, t, k, p.Name, "moved-1", node1)
		if after := getJSON[counterState](ctx, t, p, 8080, "/status"); after.PID != before.PID || !after.Started.Equal(before.Started) {
			t.Errorf("before %+v, after %+v", before, after)
		}
	})
	t.Run("gate off", func(t *testing.T) {
		back := change(ctx, t, node2, gateOff, gateOn, cluster.Kubelet)
		p := start(ctx, t, k, "counter-2", onNode2("counter-2"))
		before := getJSON[counterState](ctx, t, p, 8080, "/status")
		refused(ctx, t, k, p.Name, "c-gate", node1, []string{"does not serve migrations", "run a kubelet with podmig there and switch the feature gate PodMigration on"})
		undisturbed(ctx, t, k, p, before)
		back()
		until(ctx, t, "the kubelet knows the pod", func() error {
			now, err := k.Pod(ctx, p.Name)
			if err == nil && !now.Status.ContainerStatuses[0].Ready {
				err = errors.New("it is not ready")
			}
			return err
		})
		move(ctx, t, k, p.Name, "moved-2", node1)
	})
}

// A kubelet of another version of podmig may speak another version of the protocol.
// Here the test is such a source: it passes the questions of the target's kubelet on
// to a real one, as if they were of a version that this one does not know.
func TestAnotherProtocolVersionIsRefused(t *testing.T) {
	ctx, k := begin(t, 2*time.Minute)
	const node3 = "node3"
	backend := kubeletAddress(ctx, t, node1)
	hub, port, err := serveAs(ctx, t, node3, func(w http.ResponseWriter, r *http.Request) {
		path := strings.Replace(r.URL.Path, "/migration/v1alpha1/", "/migration/v99/", 1)
		out, err := http.NewRequestWithContext(r.Context(), r.Method, (&url.URL{Scheme: "https", Host: backend, Path: path}).String(), r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		out.ContentLength, out.Header = r.ContentLength, r.Header
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: stolen(t, node2), DialContext: hubDial, DisableKeepAlives: true}}
		resp, err := client.Do(out)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body)
	})
	if err != nil {
		t.Fatal(err)
	}
	nodeThatMoves(ctx, t, k, node3)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		// No kubelet will say that the pod is gone.
		if _, err := k.Kubectl(ctx, "delete", "pod", "counter-0", "--grace-period=0", "--force"); err != nil {
			t.Error(err)
		}
	})
	setNodeStatus(ctx, t, k, node3, fmt.Sprintf(`{"addresses": [{"type": "InternalIP", "address": %q}], "daemonEndpoints": {"kubeletEndpoint": {"Port": %d}}}`, hub, port))
	if err := k.Create(ctx, strings.Replace(counterPod(""), "nodeName: node1", "nodeName: "+node3, 1)); err != nil {
		t.Fatal(err)
	}
	p, err := k.Pod(ctx, "counter-0")
	if err != nil {
		t.Fatal(err)
	}
	p.Status.Phase = v1.PodRunning
	p.Status.ContainerStatuses = []v1.ContainerStatus{{
		Name: "counter", Image: p.Spec.Containers[0].Image, ImageID: "sha256:0", Ready: true,
		State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.Now()}},
	}}
	if _, err := k.Client.CoreV1().Pods(k.Namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	refused(ctx, t, k, p.Name, "c-version", node2, []string{`does not speak version "v99" of the migration protocol`, "run kubelets on both nodes that share one of the supported versions"})
}

// serveAs serves HTTPS beside the control plane with the certificate of a node, until
// the test ends.
func serveAs(ctx context.Context, t *testing.T, node string, handler http.HandlerFunc) (address string, port int, err error) {
	t.Helper()
	api, err := url.Parse(admin.Config.Host)
	if err != nil {
		return "", 0, err
	}
	address = api.Hostname()
	pair, err := authority(t).Issue(pki.Request{
		CommonName: "system:node:" + node, Groups: []string{"system:nodes"}, Server: true, DNSNames: []string{node}, IPs: []net.IP{net.ParseIP(address)},
	})
	if err != nil {
		return "", 0, err
	}
	cert, err := tls.X509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		return "", 0, err
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(authority(t).Cert)
	l, err := listenInHub(ctx, net.JoinHostPort(address, "0"))
	if err != nil {
		return "", 0, err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	t.Cleanup(func() { server.Close() })
	go func() {
		_ = server.Serve(tls.NewListener(l, &tls.Config{
			Certificates: []tls.Certificate{cert}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert,
		}))
	}()
	return address, l.Addr().(*net.TCPAddr).Port, nil
}

// listenInHub listens in the network of the control plane.
func listenInHub(ctx context.Context, address string) (net.Listener, error) {
	pid, err := admin.Cluster.Hub().InitPID()
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	type result struct {
		l   net.Listener
		err error
	}
	done := make(chan result)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{err: err}
			return
		}
		var config net.ListenConfig
		l, err := config.Listen(ctx, "tcp", address)
		done <- result{l, err}
	}()
	r := <-done
	return r.l, r.err
}
