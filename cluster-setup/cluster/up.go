package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"podmig.dev/podmig/cluster-setup/cgroup"
	"podmig.dev/podmig/cluster-setup/manifests"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// Deadlines of the slow steps, generous for a busy machine of two processors.
const (
	apiTimeout  = 2 * time.Minute
	nodeTimeout = 3 * time.Minute
	dnsTimeout  = 2 * time.Minute
	pollEvery   = 50 * time.Millisecond
)

// action is one step of Up.
type action struct {
	name string
	run  func(context.Context) error
}

// progress prints what was done and how long it took.
type progress struct {
	out   io.Writer
	began time.Time
}

func (p progress) run(ctx context.Context, actions []action) error {
	for _, a := range actions {
		began := time.Now()
		if err := a.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", a.name, err)
		}
		fmt.Fprintf(p.out, "%7.2fs  %-40s %6.2fs\n", time.Since(p.began).Seconds(), a.name, time.Since(began).Seconds())
	}
	return nil
}

// Up makes a cluster and returns when all its nodes are ready. When that fails, nothing is left behind unless the options ask
// for it.
func Up(ctx context.Context, options Options) (_ *Cluster, err error) {
	if err := options.check(); err != nil {
		return nil, err
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, lockPath(options.Dir))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(filepath.Join(options.Dir, stateFile)); err == nil {
		return nil, fmt.Errorf("cluster %s exists in %s already: use it, or take it down first", options.Name, options.Dir)
	}
	if layout.Exists(cgroupOf(options.Name, options.Dir)) {
		return nil, fmt.Errorf("processes of an earlier cluster %s of this folder still run: take it down first", options.Name)
	}
	if err := os.MkdirAll(options.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make cluster folder: %w", err)
	}
	c := &Cluster{dir: options.Dir, layout: layout, state: state{
		Name: options.Name, Bin: options.Bin, NodeBin: options.NodeBin, RootFS: options.RootFS, FeatureGates: options.FeatureGates,
		Images: options.Images, ProxyMode: options.ProxyMode, Audit: options.Audit,
	}}
	for number := 1; number <= options.Nodes; number++ {
		c.state.Nodes = append(c.state.Nodes, number)
	}
	if err := c.save(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && !options.Retain {
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
			defer cancel()
			err = errors.Join(err, destroy(cleanup, layout, options.Name, options.Dir))
		}
	}()
	show := progress{out: options.Progress, began: time.Now()}
	fmt.Fprintf(show.out, "cluster %s: %d nodes, control groups %s, binaries of %s\n", options.Name, options.Nodes, layout.Mode, options.Bin)
	var seeded bool
	err = show.run(ctx, []action{
		{"prepare host", func(context.Context) error { return prepareHost(layout, options.Name, options.Dir) }},
		{"make certificates", func(context.Context) error { return c.makeCertificates() }},
		{"start control plane", c.startHub},
		{"take stored images", func(ctx context.Context) (err error) { seeded, err = c.seed(ctx, c.NodeNames()); return err }},
		{"start nodes", func(ctx context.Context) error { return c.startNodes(ctx, c.state.Nodes) }},
		// The API server needs a moment anyway.
		{"import images", func(ctx context.Context) error { return c.importOrSkip(ctx, c.NodeNames(), seeded) }},
		{"wait for the API server", c.waitAPI},
		{"apply roles", c.applyRoles},
		{"start kubelets", func(ctx context.Context) error { return c.startKubelets(ctx, c.NodeNames()) }},
		{"wait for nodes", func(ctx context.Context) error { return c.waitNodes(ctx, c.NodeNames()) }},
		{"start cluster DNS", func(ctx context.Context) error { return c.startDNS(ctx, show.out) }},
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (o *Options) check() error {
	if err := checkName(o.Name); err != nil {
		return err
	}
	if o.Nodes < 1 || o.Nodes > MaxNodes {
		return fmt.Errorf("%d nodes: choose between 1 and %d", o.Nodes, MaxNodes)
	}
	if os.Geteuid() != 0 {
		return errors.New("making namespaces and control groups needs root: run this as root")
	}
	for _, path := range []*string{&o.Dir, &o.Bin, &o.RootFS} {
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return fmt.Errorf("find %s: %w", *path, err)
		}
		*path = absolute
	}
	// The image's folder is a link to the current version, which may change while this cluster runs.
	rootfs, err := filepath.EvalSymlinks(o.RootFS)
	if err != nil {
		return fmt.Errorf("no node image in %s: build it with nodeimage", o.RootFS)
	}
	o.RootFS = rootfs
	// Characters with a meaning in overlay mount options.
	if strings.ContainsAny(o.Dir+o.RootFS, ",:") {
		return fmt.Errorf("folders %s and %s: commas and colons are not possible here", o.Dir, o.RootFS)
	}
	if _, err := os.Stat(filepath.Join(o.RootFS, "etc")); err != nil {
		return fmt.Errorf("no node image in %s: build it with nodeimage", o.RootFS)
	}
	for _, name := range []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kubelet", "kube-proxy", "containerd", "containerd-shim-runc-v2", "ctr", "runc"} {
		if _, err := os.Stat(filepath.Join(o.Bin, name)); err != nil {
			return fmt.Errorf("binary %s is missing in %s: run make build", name, o.Bin)
		}
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	return nil
}

func (c *Cluster) startNodes(ctx context.Context, numbers []int) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, number := range numbers {
		p, err := planNode(number)
		if err != nil {
			return err
		}
		group.Go(func() error { return c.startNode(ctx, p) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return c.connectPods()
}

// AddNode adds one node to a running cluster and returns its name.
func (c *Cluster) AddNode(ctx context.Context, out io.Writer) (string, error) {
	unlock, err := lock(ctx, lockPath(c.dir))
	if err != nil {
		return "", err
	}
	defer unlock()
	number := 1
	for _, have := range c.state.Nodes {
		number = max(number, have+1)
	}
	p, err := planNode(number)
	if err != nil {
		return "", err
	}
	c.state.Nodes = append(c.state.Nodes, number)
	if err := c.save(); err != nil {
		return "", err
	}
	show := progress{out: out, began: time.Now()}
	var seeded bool
	return p.name, show.run(ctx, []action{
		{"take stored images", func(ctx context.Context) (err error) { seeded, err = c.seed(ctx, []string{p.name}); return err }},
		{"start node", func(ctx context.Context) error { return c.startNodes(ctx, []int{number}) }},
		{"import images", func(ctx context.Context) error { return c.importOrSkip(ctx, []string{p.name}, seeded) }},
		{"start kubelet", func(ctx context.Context) error { return c.startKubelets(ctx, []string{p.name}) }},
		{"wait for node", func(ctx context.Context) error { return c.waitNodes(ctx, []string{p.name}) }},
	})
}

// HTTPClient calls the API server as the administrator, from inside the cluster's network and with both certificates verified.
func (c *Cluster) HTTPClient() (*http.Client, error) {
	config, err := c.clientConfig()
	if err != nil {
		return nil, err
	}
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: config,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return c.Hub().Dial(ctx, network, address)
		},
	}}, nil
}

func (c *Cluster) clientConfig() (*tls.Config, error) {
	ca, err := c.loadCA("ca")
	if err != nil {
		return nil, err
	}
	return adminTLS(ca)
}

func (c *Cluster) waitAPI(ctx context.Context) error {
	return c.waitObject(ctx, apiTimeout, "/readyz", nil)
}

// waitObject polls a path of the API server until it is there and the check, when given, is content with it.
func (c *Cluster) waitObject(ctx context.Context, timeout time.Duration, path string, check func([]byte) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	client, err := c.HTTPClient()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	return poll(ctx, func() error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, apiURL()+path, nil)
		if err != nil {
			return err
		}
		answer, err := client.Do(request)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("read %s: status %s", path, answer.Status)
		}
		if check == nil {
			return nil
		}
		return check(body)
	})
}

// poll repeats a question that has no event to wait for.
func poll(ctx context.Context, ask func() error) error {
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(pollEvery):
		}
	}
}

func waitUnix(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	var dialer net.Dialer
	return poll(ctx, func() error {
		conn, err := dialer.DialContext(ctx, "unix", path)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

func (c *Cluster) applyRoles(ctx context.Context) error { return c.Apply(ctx, manifests.RBAC) }

// Apply sends manifests to the API server.
func (c *Cluster) Apply(ctx context.Context, manifest []byte) error {
	return c.kubectlQuiet(ctx, string(manifest), "apply", "-f", "-")
}

// kubectlQuiet runs kubectl and quotes its output only when it fails.
func (c *Cluster) kubectlQuiet(ctx context.Context, input string, args ...string) error {
	var out strings.Builder
	err := c.Kubectl(ctx, supervisor.Command{Args: args, Stdin: strings.NewReader(input), Stdout: &out, Stderr: &out})
	if err != nil {
		return fmt.Errorf("kubectl %s: %w: %s", args[0], err, strings.TrimSpace(out.String()))
	}
	return nil
}

func (c *Cluster) waitNodes(ctx context.Context, names []string) error {
	for _, name := range names {
		ctx, stop := c.whileStable(ctx, name)
		err := c.waitObject(ctx, nodeTimeout, "/api/v1/nodes/"+name, isReady)
		cause := context.Cause(ctx)
		stop()
		if err != nil {
			return fmt.Errorf("node %s: %w", name, errors.Join(cause, err))
		}
	}
	// Without it no pod is admitted, and a controller makes it when it gets to it.
	return c.waitObject(ctx, nodeTimeout, "/api/v1/namespaces/default/serviceaccounts/default", nil)
}

// hopeless is how many ends in a row tell that a component will not stay up.
const hopeless = 4

// whileStable returns a context that ends when one of a machine's components keeps ending, since nothing good will come then.
func (c *Cluster) whileStable(ctx context.Context, machine string) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		for ctx.Err() == nil {
			components, err := c.machine(machine).Supervisor().Status(ctx)
			if err != nil {
				cancel(err)
				return
			}
			for _, one := range components {
				if one.Restarts >= hopeless {
					cancel(fmt.Errorf("%s ended %d times, with %s; its last words: %s", one.Name, one.Restarts, one.LastExit, c.lastWords(machine, one.Name)))
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// lastWords is the last line of a component's log: the log itself goes when a failed cluster is removed.
func (c *Cluster) lastWords(machine, component string) string {
	content, err := os.ReadFile(filepath.Join(c.machine(machine).Logs(), component+".log"))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	return lines[len(lines)-1]
}

// isReady reads just as much of a node object as the question needs.
func isReady(object []byte) error {
	var node struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := json.Unmarshal(object, &node); err != nil {
		return fmt.Errorf("decode node: %w", err)
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == "Ready" && condition.Status == "True" {
			return nil
		}
		if condition.Type == "Ready" {
			return fmt.Errorf("not ready: %s", condition.Message)
		}
	}
	return errors.New("not ready: its kubelet has not reported yet")
}
