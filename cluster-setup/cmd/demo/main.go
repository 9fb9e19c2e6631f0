// Command demo shows what podmig does: it starts a cluster of two nodes on this
// machine, fills a redis with a million keys, moves it to the other node while a
// client keeps asking, and tells what survived and how long it was away. Then it drains a node
// under another one.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/tools/clone"
)

func main() {
	// The first process of every machine of the cluster is this program, too.
	if machine, err := netns.Main(os.Args); machine {
		if err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use: "demo", Short: "move a redis between two nodes and show what survived",
		Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), cmd.OutOrStdout(), keep) },
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the cluster running")
	return cmd
}

const keys = "1000000"

const pod = `
apiVersion: v1
kind: Pod
metadata: {name: redis, labels: {app: redis}}
spec:
  nodeName: node1
  containers:
  - name: redis
    image: podmig.dev/redis:v1
    imagePullPolicy: Never
    readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
`

func run(ctx context.Context, out io.Writer, keep bool) (err error) {
	var images []string
	for _, name := range []string{"pause", "coredns", "redis", "controller"} {
		images = append(images, filepath.Join(".build/images", name+".tar"))
	}
	o := cluster.Options{
		Name: "demo", Dir: ".build/cluster/demo", Bin: ".build/bin", RootFS: ".build/image/rootfs",
		Nodes: 2, Images: images, ProxyMode: "nftables", Progress: out,
	}
	if err := cluster.Down(ctx, o.Name, o.Dir); err != nil && !errors.Is(err, cluster.ErrNoCluster) {
		return err
	}
	c, err := cluster.Up(ctx, o)
	defer func() {
		if keep && err == nil {
			fmt.Fprintf(out, "\nThe cluster stays: .build/bin/localcluster --name demo kubectl get pods; remove it with .build/bin/localcluster --name demo down\n")
			return
		}
		err = errors.Join(err, cluster.Down(context.WithoutCancel(ctx), o.Name, o.Dir))
	}()
	if err != nil {
		return err
	}
	k, err := kit.New(c, "default")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	d := &demo{k, func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }}
	moved, err := d.clone(ctx)
	if err != nil {
		return err
	}
	drained, err := d.drain(ctx)
	if err != nil {
		return err
	}
	d.say("\nIn short: %s with clonePod; %s when its node was drained.", moved, drained)
	return nil
}

type demo struct {
	*kit.Kit
	say func(format string, args ...any)
}

// fill gives a redis a million keys and returns what it is then.
func (d *demo) fill(ctx context.Context, name string) (state, error) {
	if _, err := d.Exec(ctx, name, "redis-cli", "eval",
		"for i=1,"+keys+" do redis.call('set','key:'..i,'value:'..i) end return redis.call('dbsize')", "0"); err != nil {
		return state{}, err
	}
	s, err := look(ctx, d.Kit, name)
	if err == nil {
		d.say("  %s", s)
	}
	return s, err
}

// same fails unless a redis is the one from before, with all its keys.
func (d *demo) same(ctx context.Context, name string, before state) error {
	after, err := look(ctx, d.Kit, name)
	if err != nil {
		return err
	}
	d.say("  %s", after)
	wrong, err := d.Exec(ctx, name, "redis-cli", "eval",
		"local n=0 for i=1,"+keys+" do if redis.call('get','key:'..i)~='value:'..i then n=n+1 end end return n", "0")
	if err != nil {
		return err
	}
	if wrong = strings.TrimSpace(wrong); wrong != "0" || after.runID != before.runID || after.keys != before.keys {
		return fmt.Errorf("the redis on %s is not the one from %s: %s wrong values, run %s was %s", after.node, before.node, wrong, after.runID, before.runID)
	}
	d.say("\nSame process, same data: run_id %s, %s keys, %s of them wrong, up for %s s, restarted 0 times.", after.runID, after.keys, wrong, after.uptime)
	return nil
}

// during has a client ask redis every millisecond, at its address and at those that node2
// gives to pods meanwhile, and returns how long it waited at most.
func (d *demo) during(ctx context.Context, ip string, move func() error) (time.Duration, error) {
	w := watch(ctx, d.Kit)
	defer w.close()
	w.ask(ip)
	if err := w.gap.After(ctx, time.Now()); err != nil {
		return 0, fmt.Errorf("redis does not answer: %w", err)
	}
	looking, stop := context.WithCancel(ctx)
	defer stop()
	found := make(chan error, 1)
	go func() {
		found <- d.NewAddresses(looking, "node2", func(ip string) error { w.ask(ip); return nil })
	}()
	w.gap.Longest()
	if err := move(); err != nil {
		return 0, err
	}
	if err := w.gap.After(ctx, time.Now()); err != nil {
		return 0, fmt.Errorf("redis does not answer: %w", err)
	}
	stop()
	return w.gap.Longest(), <-found
}

// clone moves a redis with nothing but a second pod.
func (d *demo) clone(ctx context.Context) (string, error) {
	d.say("\nA redis starts on node1 and gets a million keys.")
	if err := d.Create(ctx, pod); err != nil {
		return "", err
	}
	p, err := d.WaitRunning(ctx, "redis")
	if err != nil {
		return "", err
	}
	before, err := d.fill(ctx, "redis")
	if err != nil {
		return "", err
	}
	d.say("\nA client outside asks it every millisecond. Pod redis-moved on node2 says clonePod: redis.")
	start := time.Now()
	gap, err := d.during(ctx, p.Status.PodIP, func() error {
		start = time.Now()
		_, err := d.Move(ctx, "redis", clone.Options{Name: "redis-moved", Node: "node2"})
		return err
	})
	total := time.Since(start)
	if err != nil {
		return "", err
	}
	if _, err := d.WaitRunning(ctx, "redis-moved"); err != nil {
		return "", err
	}
	for _, e := range d.Events(ctx, "redis-moved") {
		d.say("    %-10s %s", e.Reason, e.Message)
	}
	source, err := d.Pod(ctx, "redis")
	if err != nil {
		return "", err
	}
	d.say("  pod redis on node1: %s, %s: %s", source.Status.Phase, source.Status.Reason, source.Status.Message)
	if err := d.same(ctx, "redis-moved", before); err != nil {
		return "", err
	}
	d.say("The client waited %d ms; the whole move took %.1f s.", gap.Milliseconds(), total.Seconds())
	for _, name := range []string{"redis", "redis-moved"} {
		if err := d.Delete(ctx, name); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d ms without an answer", gap.Milliseconds()), nil
}

const migratingPod = `
apiVersion: podmig.dev/v1alpha1
kind: MigratingPod
metadata: {name: shop}
spec:
  template:
    metadata: {labels: {app: shop}}
    spec:
      affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}}]}}
      containers:
      - name: redis
        image: podmig.dev/redis:v1
        imagePullPolicy: Never
        readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
`

// drain empties the node of a MigratingPod.
func (d *demo) drain(ctx context.Context) (string, error) {
	d.say("\nThe controller is installed, and MigratingPod shop starts a redis of its own on node1.")
	if err := d.InstallController(ctx); err != nil {
		return "", err
	}
	if err := d.Apply(ctx, migratingPod); err != nil {
		return "", err
	}
	p, err := d.WaitRunning(ctx, "shop-0")
	if err != nil {
		return "", err
	}
	before, err := d.fill(ctx, "shop-0")
	if err != nil {
		return "", err
	}
	d.say("\nThe operator drains node1: kubectl drain node1")
	gap, err := d.during(ctx, p.Status.PodIP, func() error {
		text, err := d.Kubectl(ctx, "drain", "node1", "--timeout=60s")
		for line := range strings.Lines(text) {
			d.say("    %s", strings.TrimSpace(line))
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if _, err := d.WaitRunning(ctx, "shop-1"); err != nil {
		return "", err
	}
	text, err := d.Kubectl(ctx, "get", "migratingpods,podmigrations")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(text) {
		d.say("    %s", strings.TrimRight(line, "\n"))
	}
	if err := d.same(ctx, "shop-1", before); err != nil {
		return "", err
	}
	d.say("The client waited %d ms. Without podmig the drain would have killed it.", gap.Milliseconds())
	return fmt.Sprintf("%d ms", gap.Milliseconds()), nil
}

// state is what a redis says about itself.
type state struct{ node, runID, uptime, keys string }

func (s state) String() string {
	return fmt.Sprintf("redis on %s: run_id %s, uptime_in_seconds %s, %s keys", s.node, s.runID, s.uptime, s.keys)
}

var (
	runID  = regexp.MustCompile(`run_id:(\w+)`)
	uptime = regexp.MustCompile(`uptime_in_seconds:(\d+)`)
)

func look(ctx context.Context, k *kit.Kit, name string) (state, error) {
	p, err := k.Pod(ctx, name)
	if err != nil {
		return state{}, err
	}
	info, err := k.Exec(ctx, name, "redis-cli", "info", "server")
	if err != nil {
		return state{}, err
	}
	size, err := k.Exec(ctx, name, "redis-cli", "dbsize")
	if err != nil {
		return state{}, err
	}
	id, up := runID.FindStringSubmatch(info), uptime.FindStringSubmatch(info)
	if id == nil || up == nil {
		return state{}, fmt.Errorf("redis does not say who it is: %s", info)
	}
	return state{p.Spec.NodeName, id[1], up[1], strings.TrimSpace(size)}, nil
}

// watcher asks redis at every address it is told of and remembers the longest time
// between two answers.
type watcher struct {
	k      *kit.Kit
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	gap    *kit.Gap
}

func watch(ctx context.Context, k *kit.Kit) *watcher {
	ctx, cancel := context.WithCancel(ctx)
	return &watcher{k: k, ctx: ctx, cancel: cancel, gap: kit.NewGap()}
}

func (w *watcher) close() {
	w.cancel()
	w.wg.Wait()
}

func (w *watcher) ask(ip string) {
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		for w.ctx.Err() == nil {
			w.converse(net.JoinHostPort(ip, "6379"))
			select {
			case <-w.ctx.Done():
			case <-time.After(time.Millisecond):
			}
		}
	}()
}

// converse asks until an answer fails to come.
func (w *watcher) converse(address string) {
	ctx, cancel := context.WithTimeout(w.ctx, 50*time.Millisecond)
	defer cancel()
	conn, err := w.k.Cluster.Hub().Dial(ctx, "tcp", address)
	if err != nil {
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(w.ctx, func() { conn.Close() })
	defer stop()
	answers := bufio.NewReader(conn)
	for {
		if _, err := io.WriteString(conn, "PING\r\n"); err != nil {
			return
		}
		// A connection does not survive the move; its end must not be waited for long.
		if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			return
		}
		if strings.HasPrefix(line, "+PONG") {
			w.gap.Answered()
		}
		select {
		case <-w.ctx.Done():
			return
		case <-time.After(time.Millisecond):
		}
	}
}
