package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/tools/clone"
)

// Options say what to measure.
type Options struct {
	// Sizes of the pod's ballast in MB.
	Sizes []int
	// Repetitions of each arm at each size.
	Repetitions int
	// Ballast is the program of the ballast pod, for the arm without Kubernetes.
	Ballast string
	// Progress receives a line per repetition.
	Progress io.Writer
}

// Bench measures on a cluster of two nodes.
type Bench struct {
	kit   *kit.Kit
	nodes [2]string
	opts  Options
}

// New returns a bench on the first two nodes of the kit's cluster.
func New(k *kit.Kit, o Options) (*Bench, error) {
	names := k.Cluster.NodeNames()
	if len(names) < 2 {
		return nil, errors.New("the benchmark needs a cluster of two nodes")
	}
	return &Bench{kit: k, nodes: [2]string{names[0], names[1]}, opts: o}, nil
}

// Run measures everything.
func (b *Bench) Run(ctx context.Context) (*Result, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	r := &Result{CPUs: runtime.NumCPU(), Kernel: unix.ByteSliceToString(u.Release[:])}
	for _, mb := range b.opts.Sizes {
		s, err := b.size(ctx, mb)
		if err != nil {
			return nil, fmt.Errorf("%d MB: %w", mb, err)
		}
		r.Sizes = append(r.Sizes, *s)
	}
	return r, nil
}

func (b *Bench) size(ctx context.Context, mb int) (*Size, error) {
	s := &Size{MB: mb}
	m := &mover{b: b, prefix: fmt.Sprintf("moved-%d", mb), mb: mb}
	defer m.end(ctx)
	for i := range b.opts.Repetitions {
		move, err := m.move(ctx)
		if err != nil {
			return nil, fmt.Errorf("move: %w", err)
		}
		gap, err := b.recreate(ctx, mb, i)
		if err != nil {
			return nil, fmt.Errorf("recreate: %w", err)
		}
		bare, err := b.bare(ctx, mb)
		if err != nil {
			return nil, fmt.Errorf("bare criu: %w", err)
		}
		s.Moves = append(s.Moves, *move)
		s.Recreate = append(s.Recreate, gap.Seconds())
		s.Bare = append(s.Bare, *bare)
		fmt.Fprintf(b.opts.Progress, "%5d MB, %d of %d: gap %.2f s, recreate %.2f s, bare criu %.2f s\n",
			mb, i+1, b.opts.Repetitions, move.Gap, gap.Seconds(), bare.Sum())
	}
	return s, nil
}

const port = 8080

// pod is a ballast pod on a node.
func pod(name, node string, mb int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 30
  containers:
  - name: ballast
    image: podmig.dev/ballast:v1
    imagePullPolicy: Never
    env: [{name: BALLAST_MB, value: "%d"}]
    readinessProbe: {httpGet: {path: /ready, port: %d}, periodSeconds: 1}
`, name, node, mb, port)
}

// mover is one ballast pod that goes back and forth.
type mover struct {
	b      *Bench
	prefix string
	mb     int

	moves  int
	name   string
	client *client
	ctx    context.Context
}

func (m *mover) end(ctx context.Context) {
	if m.client != nil {
		m.client.close()
	}
	if m.name != "" {
		_ = m.b.kit.Delete(ctx, m.name)
	}
}

func (m *mover) begin(ctx context.Context) error {
	m.name = m.prefix + "-0"
	if err := m.b.kit.Create(ctx, pod(m.name, m.b.nodes[0], m.mb)); err != nil {
		return err
	}
	p, err := m.b.kit.WaitRunning(ctx, m.name)
	if err != nil {
		return err
	}
	m.client, m.ctx = newClient(ctx, m.b.kit.Cluster.Hub().Dial)
	return m.client.ask(m.ctx, address(p.Status.PodIP))
}

func address(ip string) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

func (m *mover) move(ctx context.Context) (*Move, error) {
	if m.client == nil {
		if err := m.begin(ctx); err != nil {
			return nil, err
		}
	}
	source, target := m.b.nodes[m.moves%2], m.b.nodes[(m.moves+1)%2]
	before, err := m.b.metrics(ctx, source, target)
	if err != nil {
		return nil, err
	}
	if err := m.client.gap.After(ctx, time.Now()); err != nil {
		return nil, fmt.Errorf("the pod does not answer: %w", err)
	}
	m.client.gap.Longest()

	m.moves++
	next := fmt.Sprintf("%s-%d", m.prefix, m.moves)
	watching, stop := context.WithCancel(ctx)
	defer stop()
	found := make(chan error, 1)
	go func() {
		found <- m.b.kit.NewAddresses(watching, target, func(ip string) error { return m.client.ask(m.ctx, address(ip)) })
	}()
	start := time.Now()
	if _, err := m.b.kit.Move(ctx, m.name, clone.Options{Name: next, Node: target}); err != nil {
		return nil, err
	}
	total := time.Since(start)
	stop()
	if err := <-found; err != nil {
		return nil, err
	}
	if err := m.client.gap.After(ctx, time.Now()); err != nil {
		return nil, fmt.Errorf("the moved pod does not answer: %w", err)
	}
	gap := m.client.gap.Longest()
	after, err := m.b.metrics(ctx, source, target)
	if err != nil {
		return nil, err
	}
	if err := m.b.kit.Delete(ctx, m.name); err != nil {
		return nil, err
	}
	m.name = next
	if err := m.check(ctx); err != nil {
		return nil, err
	}
	mv := &Move{Gap: gap.Seconds(), Total: total.Seconds(), Phases: make(map[string]float64)}
	for name, value := range after {
		d := value - before[name]
		if phase, ok := strings.CutPrefix(name, "phase "); ok {
			mv.Phases[phase] = d
		} else {
			mv.Bytes = d
		}
	}
	return mv, nil
}

// check makes the pod compare its memory with what it wrote there.
func (m *mover) check(ctx context.Context) error {
	_, err := m.b.kit.Client.CoreV1().Pods(m.b.kit.Namespace).ProxyGet("http", m.name, strconv.Itoa(port), "check", nil).DoRaw(ctx)
	if err != nil {
		return fmt.Errorf("the memory of the moved pod is not what it was: %w", err)
	}
	return nil
}

// metrics sums the kubelets' figures of both nodes.
func (b *Bench) metrics(ctx context.Context, nodes ...string) (map[string]float64, error) {
	sums := make(map[string]float64)
	for _, node := range nodes {
		raw, err := b.kit.Client.CoreV1().RESTClient().Get().Resource("nodes").Name(node).SubResource("proxy").Suffix("metrics").DoRaw(ctx)
		if err != nil {
			return nil, fmt.Errorf("read the metrics of %s: %w", node, err)
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("parse the metrics of %s: %w", node, err)
		}
		for _, m := range families["podmig_phase_duration_seconds"].GetMetric() {
			sums["phase "+m.GetLabel()[0].GetValue()] += m.GetHistogram().GetSampleSum()
		}
		for _, m := range families["podmig_checkpoint_bytes_total"].GetMetric() {
			if m.GetLabel()[0].GetValue() == "received" {
				sums["bytes"] += m.GetCounter().GetValue()
			}
		}
	}
	return sums, nil
}

// recreate deletes a pod and creates it on the other node as soon as it is gone.
func (b *Bench) recreate(ctx context.Context, mb, i int) (time.Duration, error) {
	name := fmt.Sprintf("recreated-%d", mb)
	from, to := b.nodes[i%2], b.nodes[(i+1)%2]
	if err := b.kit.Create(ctx, pod(name, from, mb)); err != nil {
		return 0, err
	}
	p, err := b.kit.WaitRunning(ctx, name)
	if err != nil {
		return 0, err
	}
	c, cctx := newClient(ctx, b.kit.Cluster.Hub().Dial)
	defer c.close()
	if err := c.ask(cctx, address(p.Status.PodIP)); err != nil {
		return 0, err
	}
	if err := c.gap.After(ctx, time.Now()); err != nil {
		return 0, err
	}
	c.gap.Longest()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	found := make(chan error, 1)
	go func() {
		found <- b.kit.NewAddresses(watching, to, func(ip string) error { return c.ask(cctx, address(ip)) })
	}()
	if err := b.replace(ctx, name, pod(name, to, mb)); err != nil {
		return 0, err
	}
	if _, err := b.kit.WaitRunning(ctx, name); err != nil {
		return 0, err
	}
	stop()
	if err := <-found; err != nil {
		return 0, err
	}
	if err := c.gap.After(ctx, time.Now()); err != nil {
		return 0, err
	}
	gap := c.gap.Longest()
	return gap, b.kit.Delete(ctx, name)
}

// replace deletes a pod with its own grace period and creates its successor.
func (b *Bench) replace(ctx context.Context, name, successor string) error {
	pods := b.kit.Client.CoreV1().Pods(b.kit.Namespace)
	w, err := pods.Watch(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()})
	if err != nil {
		return err
	}
	defer w.Stop()
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	for e := range w.ResultChan() {
		if e.Type == watch.Deleted {
			return b.kit.Create(ctx, successor)
		}
	}
	return errors.New("the watch ended before the pod was gone")
}

// script runs the three steps on a node and prints how long each took, in
// nanoseconds. Images are on a tmpfs, as ours are.
const script = `
set -e
d=/run/podmig-bench; mkdir -p $d/a; cd $d
BALLAST_MB=$1 BALLAST_LISTEN=127.0.0.1:18080 GODEBUG=multipathtcp=0 setsid ./ballast </dev/null >$d/out 2>&1 &
pid=$!
for i in $(seq 600); do grep -q holding $d/out && break; sleep 0.1; done
grep -q holding $d/out
a=$(date +%s%N)
criu dump -t $pid -D $d/a -o dump.log --shell-job --manage-cgroups=ignore >&2
b=$(date +%s%N)
cp -r $d/a $d/b
c=$(date +%s%N)
criu restore -D $d/b -o restore.log --shell-job --restore-detached --manage-cgroups=ignore >&2
e=$(date +%s%N)
kill -9 $pid
echo $((b-a)) $((c-b)) $((e-c))
`

// bare measures CRIU alone, on the first node.
func (b *Bench) bare(ctx context.Context, mb int) (_ *Bare, err error) {
	m, err := b.kit.Cluster.Machine(b.nodes[0])
	if err != nil {
		return nil, err
	}
	clear := func(ctx context.Context) error {
		return b.kit.Cluster.Run(ctx, b.nodes[0], supervisor.Command{Args: []string{"rm", "-rf", "/run/podmig-bench"}})
	}
	if err := install(m, b.opts.Ballast); err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, clear(context.WithoutCancel(ctx)))
	}()
	var out, errs bytes.Buffer
	command := supervisor.Command{Args: []string{"sh", "-c", script, "sh", strconv.Itoa(mb)}, Stdout: &out, Stderr: &errs}
	if err := b.kit.Cluster.Run(ctx, b.nodes[0], command); err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
	}
	var dump, copied, restore int64
	if _, err := fmt.Sscan(out.String(), &dump, &copied, &restore); err != nil {
		return nil, fmt.Errorf("figures %q: %w", out.String(), err)
	}
	second := func(ns int64) float64 { return float64(ns) / 1e9 }
	return &Bare{Dump: second(dump), Copy: second(copied), Restore: second(restore)}, nil
}

// install puts the ballast program into the machine's /run.
func install(m netns.Machine, program string) error {
	pid, err := m.InitPID()
	if err != nil {
		return err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return fmt.Errorf("read the ballast program: %w", err)
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid), "root/run/podmig-bench")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "ballast"), data, 0o755)
}
