package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cgroup"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// Options say what cluster to make.
type Options struct {
	Name string
	// Dir holds everything the cluster writes. It is created, and removed by Down.
	Dir string
	// Bin holds the binaries.
	Bin string
	// NodeBin gives single nodes, by name, another folder of binaries; what it lacks is taken from Bin.
	NodeBin map[string]string
	// RootFS is the unpacked node image.
	RootFS string
	Nodes  int
	// FeatureGates are set on every component. PodMigration is set without being named here on those components whose version
	// says that they know it, unless it is named here.
	FeatureGates map[string]bool
	// Images are archives imported on every node.
	Images []string
	// ProxyMode of kube-proxy: nftables or iptables.
	ProxyMode string
	// Audit makes the API server write every request's metadata to its log folder.
	Audit bool
	// Retain keeps a cluster whose start failed, for a look at its logs.
	Retain bool
	// Progress receives a line per finished step.
	Progress io.Writer
}

// Cluster is a handle on a cluster that may or may not run.
type Cluster struct {
	state  state
	dir    string
	layout cgroup.Layout
}

// state is what later commands need to know; it is written before anything else exists.
type state struct {
	Name         string            `json:"name"`
	Bin          string            `json:"bin"`
	NodeBin      map[string]string `json:"nodeBin,omitempty"`
	RootFS       string            `json:"rootfs"`
	Nodes        []int             `json:"nodes"`
	FeatureGates map[string]bool   `json:"featureGates,omitempty"`
	Images       []string          `json:"images,omitempty"`
	ProxyMode    string            `json:"proxyMode"`
	Audit        bool              `json:"audit,omitempty"`
}

const stateFile = "cluster.json"

// ErrNoCluster says that the folder holds no cluster.
var ErrNoCluster = errors.New("no such cluster")

// Load finds a cluster by its folder.
func Load(dir string) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("find cluster: %w", err)
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, layout: layout}
	content, err := os.ReadFile(filepath.Join(dir, stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: start one with localcluster up", ErrNoCluster, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read cluster: %w", err)
	}
	if err := json.Unmarshal(content, &c.state); err != nil {
		return nil, fmt.Errorf("decode cluster: %w", err)
	}
	return c, nil
}

// save replaces the state file in one step: a reader never meets half of it.
func (c *Cluster) save() error {
	data, err := json.MarshalIndent(c.state, "", "  ")
	if err != nil {
		return fmt.Errorf("encode cluster: %w", err)
	}
	path := filepath.Join(c.dir, stateFile)
	if err := os.WriteFile(path+".new", append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write cluster: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write cluster: %w", err)
	}
	return nil
}

// ErrBusy says that another command is changing the same cluster.
var ErrBusy = errors.New("another command is changing this cluster: wait for it")

// lockPatience is how long a lock is waited for. After a killed command its lock is free in a moment only: a program that it was
// just starting still holds a copy.
const lockPatience = 3 * time.Second

// lock keeps two changes of one cluster apart. The kernel gives it back when the process ends, however it ends.
func lock(ctx context.Context, path string) (func(), error) {
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("lock cluster: %w", err)
	}
	var held *os.File
	err := poll(ctx, func() (err error) {
		held, err = tryLock(path)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lock cluster: %w", err)
	}
	return func() { held.Close() }, nil
}

func tryLock(path string) (_ *os.File, err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w (%s)", ErrBusy, path)
		}
		return nil, err
	}
	// Down removes the file while it holds the lock; a lock on a file that is gone keeps nobody out.
	locked, err := file.Stat()
	if err != nil {
		return nil, err
	}
	named, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !os.SameFile(locked, named) {
		return nil, ErrBusy
	}
	return file, nil
}

// lockPath lies beside the folder, since Down removes the folder while it holds the lock.
func lockPath(dir string) string { return dir + ".lock" }

// Name of the cluster.
func (c *Cluster) Name() string { return c.state.Name }

// Dir is the cluster's folder.
func (c *Cluster) Dir() string { return c.dir }

// Kubeconfig is the administrator's client configuration; the address in it is valid in the cluster's own network only.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "admin.conf") }

// Hub is the machine of the control plane.
func (c *Cluster) Hub() netns.Machine { return c.machine(hubName) }

func (c *Cluster) machine(name string) netns.Machine {
	return netns.Machine{Name: name, Dir: c.machineDir(name), Cgroup: c.cgroupOf(name), Layout: c.layout}
}

func (c *Cluster) machineDir(name string) string { return filepath.Join(c.dir, "machines", name) }

// NodeNames lists the nodes in their order.
func (c *Cluster) NodeNames() []string {
	var names []string
	for _, number := range c.state.Nodes {
		names = append(names, fmt.Sprintf("node%d", number))
	}
	return names
}

// Machine returns a node, or the hub, by name.
func (c *Cluster) Machine(name string) (netns.Machine, error) {
	if name != hubName && !slices.Contains(c.NodeNames(), name) {
		return netns.Machine{}, fmt.Errorf("cluster %s has no machine %q: there are hub, %s", c.state.Name, name, strings.Join(c.NodeNames(), ", "))
	}
	return c.machine(name), nil
}

// Run runs a command in a machine.
func (c *Cluster) Run(ctx context.Context, machine string, command supervisor.Command) error {
	m, err := c.Machine(machine)
	if err != nil {
		return err
	}
	return m.Supervisor().Run(ctx, command)
}

// Kubectl runs kubectl as the administrator. It runs beside the control plane, with the caller's files and working directory.
func (c *Cluster) Kubectl(ctx context.Context, command supervisor.Command) error {
	command.Args = append([]string{filepath.Join(c.state.Bin, "kubectl")}, command.Args...)
	// kubectl looks for its plugins in the path.
	command.Env = append(command.Env, "KUBECONFIG="+c.Kubeconfig(), "PATH="+c.state.Bin+":"+os.Getenv("PATH"))
	return c.Hub().Supervisor().Run(ctx, command)
}

// SetLink plugs or unplugs a node's cable.
func (c *Cluster) SetLink(node string, on bool) error {
	p, err := c.plan(node)
	if err != nil {
		return err
	}
	return c.Hub().SetPort(p.port, on)
}

// SetLinkBetween cuts or restores the connection between two nodes; the API server and other nodes reach both all the time. Only
// one pair can be cut at a time.
func (c *Cluster) SetLinkBetween(one, other string, on bool) error {
	for _, node := range []string{one, other} {
		p, err := c.plan(node)
		if err != nil {
			return err
		}
		if err := c.Hub().Isolate(p.port, !on); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) plan(node string) (plan, error) {
	for _, number := range c.state.Nodes {
		p, err := planNode(number)
		if err != nil || p.name == node {
			return p, err
		}
	}
	return plan{}, fmt.Errorf("cluster %s has no node %q: there are %s", c.state.Name, node, strings.Join(c.NodeNames(), ", "))
}

// ComponentPID is the host's number of a component's process.
func (c *Cluster) ComponentPID(ctx context.Context, machine, component string) (int, error) {
	m, err := c.Machine(machine)
	if err != nil {
		return 0, err
	}
	components, err := m.Supervisor().Status(ctx)
	if err != nil {
		return 0, err
	}
	for _, one := range components {
		if one.Name == component && one.PID != 0 {
			return m.HostPID(one.PID)
		}
	}
	return 0, fmt.Errorf("%s does not run on %s", component, machine)
}
