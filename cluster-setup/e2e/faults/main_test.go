//go:build e2e

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/kubelet/migration"
)

// What a machine is in a scenario.
const (
	source = "source"
	target = "target"
	hub    = "hub"
)

// lane is a pair of nodes between which one pod at a time is moved: the machine of
// each part. Lanes share the machine of the control plane and nothing else.
type lane map[string]string

// lanes are as many as scenarios run at a time. A scenario mostly waits, so two of
// them are not too much for two processors.
var lanes = []lane{
	{source: "node1", target: "node2", hub: hub},
	{source: "node3", target: "node4", hub: hub},
}

// free has the lanes that nobody uses.
var free = make(chan lane, len(lanes))

// whole is held for reading by scenarios with a lane, for writing by one that breaks
// what all lanes share.
var whole sync.RWMutex

// nodes are the machines of all lanes.
func nodes() []string {
	var all []string
	for _, l := range lanes {
		all = append(all, l[source], l[target])
	}
	return all
}

// deadlines are short enough for a test and long enough for a busy machine.
var deadlines = migration.Deadlines{
	Idle: 20 * time.Second, Open: 20 * time.Second, Stream: 10 * time.Second, Freeze: 10 * time.Second,
	Commit: 3 * time.Second, Restore: 16 * time.Second, Outcome: 3 * time.Second, Abort: 5 * time.Second,
	RetryMax: time.Second,
}

// Made once for all tests.
var (
	admin    *kit.Kit
	watch    *witness
	mover    *program
	baseline = map[string]map[string]int{} // by machine
)

func TestMain(m *testing.M) {
	if machine, err := netns.Main(os.Args); machine {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	c, down, err := provide(ctx)
	if err == nil {
		defer func() {
			if err := down(); err != nil {
				fmt.Fprintln(os.Stderr, "faults:", err)
				code = 1
			}
		}()
		err = prepare(ctx, c)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		return 1
	}
	defer watch.close()
	defer mover.end(unix.SIGTERM)
	return m.Run()
}

// buildDir is where everything is built.
func buildDir() (string, error) { return filepath.Abs("../../../.build") }

// provide makes the cluster. With PODMIG_FAULTS_CLUSTER set it is made in that folder
// unless it runs there already, and left running.
func provide(ctx context.Context) (*cluster.Cluster, func() error, error) {
	build, err := buildDir()
	if err != nil {
		return nil, nil, err
	}
	dir, keep := os.LookupEnv("PODMIG_FAULTS_CLUSTER")
	if !keep {
		dir = filepath.Join(build, "cluster", "faults")
	}
	if c, err := cluster.Load(dir); keep && err == nil {
		return c, func() error { return nil }, nil
	}
	var images []string
	for _, name := range []string{"pause", "coredns", "counter"} {
		images = append(images, filepath.Join(build, "images", name+".tar"))
	}
	bin := filepath.Join(build, "bin")
	broken := make(map[string]string)
	for _, node := range nodes() {
		broken[node] = filepath.Join(bin, "faults")
	}
	o := cluster.Options{
		Name: filepath.Base(dir), Dir: dir, Bin: bin, RootFS: filepath.Join(build, "image", "rootfs"), Nodes: len(broken), Images: images,
		NodeBin: broken, ProxyMode: "nftables", Progress: os.Stdout,
	}
	// What an interrupted run has left behind goes first.
	if err := cluster.Down(ctx, o.Name, o.Dir); err != nil && !errors.Is(err, cluster.ErrNoCluster) {
		return nil, nil, err
	}
	c, err := cluster.Up(ctx, o)
	return c, func() error {
		if keep {
			return nil
		}
		return cluster.Down(context.WithoutCancel(ctx), o.Name, o.Dir)
	}, err
}

// prepare gives the nodes short deadlines and the address of the witness, and notes
// what they look like before anything was moved.
func prepare(ctx context.Context, c *cluster.Cluster) error {
	var err error
	if admin, err = kit.New(c, metav1.NamespaceDefault); err != nil {
		return err
	}
	for _, node := range nodes() {
		m, err := c.Machine(node)
		if err != nil {
			return err
		}
		dir, err := inside(m, faultDir)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		text, err := json.Marshal(deadlines)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "deadlines.json"), text, 0o644); err != nil {
			return err
		}
		if err := killDaemon(ctx, node, cluster.Kubelet); err != nil {
			return err
		}
		if err := m.Supervisor().Run(ctx, supervisor.Command{Args: []string{"ip", "address", "replace", witnessAddress + "/32", "dev", "lo"}}); err != nil {
			return fmt.Errorf("give %s the address of the witness: %w", node, err)
		}
	}
	if watch, err = newWitness(ctx, c); err != nil {
		return err
	}
	for _, l := range lanes {
		if err := l.ready(ctx); err != nil {
			return err
		}
		for _, node := range []string{l[source], l[target]} {
			if baseline[node], err = lookTwice(ctx, node); err != nil {
				return err
			}
		}
		free <- l
	}
	build, err := buildDir()
	if err != nil {
		return err
	}
	mover, err = newProgram(ctx, c, filepath.Join(build, "bin"))
	return err
}

// ready waits until every daemon runs and both nodes take pods.
func (l lane) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		why := l.unready(ctx)
		if why == nil {
			return nil
		}
		// What is asked for is spread over daemons that tell nobody.
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the nodes: %w", why)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (l lane) unready(ctx context.Context) error {
	for _, name := range l {
		m, err := admin.Cluster.Machine(name)
		if err != nil {
			return err
		}
		all, err := m.Supervisor().Status(ctx)
		if err != nil {
			return err
		}
		for _, c := range all {
			if c.State != supervisor.Running {
				return fmt.Errorf("%s on %s is %s after %s", c.Name, name, c.State, c.LastExit)
			}
		}
	}
	for _, part := range []string{source, target} {
		n, err := admin.Client.CoreV1().Nodes().Get(ctx, l[part], metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(n.Spec.Taints) > 0 {
			return fmt.Errorf("%s has the taint %s", n.Name, n.Spec.Taints[0].Key)
		}
		for _, c := range n.Status.Conditions {
			if c.Type == v1.NodeReady && c.Status != v1.ConditionTrue {
				return fmt.Errorf("%s is not ready: %s", n.Name, c.Message)
			}
		}
	}
	return nil
}
