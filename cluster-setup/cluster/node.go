package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/nodeconfig"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// PauseImage is the sandbox image that every node must have.
const PauseImage = "podmig.dev/pause:v1"

// Names of the components that a node's supervisor runs.
const (
	Containerd = "containerd"
	Kubelet    = "kubelet"
	KubeProxy  = "kube-proxy"
)

// Where a node has its binaries, image or not.
const (
	nodeBin = "/usr/local/bin"
	nodeCNI = "/opt/cni/bin"
)

const containerdSocket = "/run/containerd/containerd.sock"

// prepareNode writes everything a node needs into its file tree.
func (c *Cluster) prepareNode(ctx context.Context, p plan) error {
	upper := c.machine(p.name).Upper()
	gates, err := c.gates(ctx, filepath.Join(c.binFor(p.name, Kubelet), Kubelet))
	if err != nil {
		return err
	}
	files, err := nodeconfig.Render(nodeconfig.Values{
		Name:                p.name,
		PauseImage:          PauseImage,
		RestrictOOMScoreAdj: !hasCapability(unix.CAP_SYS_RESOURCE),
		CgroupDriver:        "cgroupfs",
		Nested:              true,
		ClusterDNS:          dnsService.String(),
		ClusterCIDR:         podNetwork.String(),
		PodCIDR:             p.pods.String(),
		PortmapBackend:      c.state.ProxyMode,
		ProxyMode:           c.state.ProxyMode,
		FeatureGates:        gates,
	})
	if err != nil {
		return err
	}
	machineID := make([]byte, 16)
	if _, err := rand.Read(machineID); err != nil {
		return fmt.Errorf("draw machine id: %w", err)
	}
	for path, content := range map[string]string{
		"/etc/hostname":    p.name + "\n",
		"/etc/hosts":       fmt.Sprintf("127.0.0.1 localhost\n%s %s\n", p.address, p.name),
		"/etc/resolv.conf": "# The nodes of a local cluster know no names outside of it.\n",
		"/etc/machine-id":  hex.EncodeToString(machineID) + "\n",
	} {
		files = append(files, nodeconfig.File{Path: path, Content: []byte(content), Mode: 0o644})
	}
	for _, file := range files {
		if err := writeFile(filepath.Join(upper, file.Path), file.Content, file.Mode); err != nil {
			return err
		}
	}
	return c.makeNodeCertificates(p, upper)
}

// binFor returns the folder from which a node takes a binary.
func (c *Cluster) binFor(node, binary string) string {
	if own, ok := c.state.NodeBin[node]; ok {
		if _, err := os.Stat(filepath.Join(own, binary)); err == nil {
			return own
		}
	}
	return c.state.Bin
}

// binds shows a node its binaries where the node image has them. They are bound, not copied: a rebuilt kubelet is there as soon
// as the component is started again.
func (c *Cluster) binds(node string) ([]netns.Bind, error) {
	binds := []netns.Bind{{Source: c.state.Bin, Target: nodeBin, ReadOnly: true}}
	cni := filepath.Join(c.state.Bin, "cni")
	if _, err := os.Stat(cni); errors.Is(err, os.ErrNotExist) {
		cni = c.state.Bin
	}
	binds = append(binds, netns.Bind{Source: cni, Target: nodeCNI, ReadOnly: true})
	own, ok := c.state.NodeBin[node]
	if !ok {
		return binds, nil
	}
	entries, err := os.ReadDir(own)
	if err != nil {
		return nil, fmt.Errorf("list binaries of %s: %w", node, err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			continue
		}
		binds = append(binds, netns.Bind{
			Source: filepath.Join(own, entry.Name()), Target: filepath.Join(nodeBin, entry.Name()), ReadOnly: true,
		})
	}
	return binds, nil
}

func (c *Cluster) startNode(ctx context.Context, p plan) error {
	hub, err := c.Hub().InitPID()
	if err != nil {
		return err
	}
	if err := c.prepareNode(ctx, p); err != nil {
		return err
	}
	binds, err := c.binds(p.name)
	if err != nil {
		return err
	}
	spec := netns.Spec{
		Name: p.name, Dir: c.machineDir(p.name), Cgroup: c.cgroupOf(p.name), Layout: c.layout,
		RootFS: c.state.RootFS, Binds: binds,
		Supervision: []supervisor.Component{
			{Name: Containerd, Args: []string{nodeBin + "/containerd"}, Log: "/var/log/podmig/containerd.log"},
			{Name: Kubelet, Hold: true, WaitFor: "unix:" + containerdSocket, Log: "/var/log/podmig/kubelet.log", Args: []string{
				nodeBin + "/kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.conf",
				"--hostname-override=" + p.name, "--node-ip=" + p.address.String(),
			}},
			{Name: KubeProxy, Hold: true, Log: "/var/log/podmig/kube-proxy.log", Args: []string{
				nodeBin + "/kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml",
			}},
		},
	}
	machine, err := netns.Start(ctx, spec, func(pid int) error {
		return netns.ConnectNode(hub, pid, p.port, netip.PrefixFrom(p.address, nodeNetwork.Bits()), hubAddress)
	})
	if err != nil {
		return err
	}
	return waitSocket(ctx, machine, containerdSocket)
}

// startKubelets lets the held components of nodes go. A kubelet that finds no API server at first asks again after ever longer
// pauses, so waiting for the API server is quicker; later, after a failure, it starts without waiting, as on a real node.
func (c *Cluster) startKubelets(ctx context.Context, nodes []string) error {
	for _, node := range nodes {
		for _, component := range []string{Kubelet, KubeProxy} {
			if err := c.machine(node).Supervisor().Start(ctx, component); err != nil {
				return fmt.Errorf("start %s on %s: %w", component, node, err)
			}
		}
	}
	return nil
}

// connectPods makes every machine route pod addresses to the node that has them.
func (c *Cluster) connectPods() error {
	for _, number := range c.state.Nodes {
		there, err := planNode(number)
		if err != nil {
			return err
		}
		for _, name := range append(c.NodeNames(), hubName) {
			if name == there.name {
				continue
			}
			if err := c.machine(name).Route(there.pods, there.address); err != nil {
				return err
			}
		}
	}
	return nil
}

// waitSocket returns when the runtime in a machine answers.
func waitSocket(ctx context.Context, machine netns.Machine, socket string) error {
	// The socket lies on a tmpfs of the machine; the first process's view of it leads there.
	pid, err := machine.InitPID()
	if err != nil {
		return err
	}
	if err := waitUnix(ctx, fmt.Sprintf("/proc/%d/root%s", pid, socket)); err != nil {
		return fmt.Errorf("containerd on %s does not answer (see its log): %w", machine.Name, err)
	}
	return nil
}

func hasCapability(capability uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}
