//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// The nodes of the cluster.
const (
	node1 = "node1"
	node2 = "node2"
)

// admin is connected to the cluster of all tests.
var admin *kit.Kit

func TestMain(m *testing.M) {
	// The first process of every machine of the cluster is this program, too.
	if machine, err := netns.Main(os.Args); machine {
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			os.Exit(1)
		}
		return
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
				fmt.Fprintln(os.Stderr, "e2e:", err)
				code = 1
			}
		}()
		admin, err = kit.New(c, metav1.NamespaceDefault)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return m.Run()
}

// provide finds or makes the cluster.
func provide(ctx context.Context) (*cluster.Cluster, func() error, error) {
	if dir := os.Getenv("PODMIG_E2E_CLUSTER"); dir != "" {
		c, err := cluster.Load(dir)
		return c, func() error { return nil }, err
	}
	build, err := filepath.Abs("../../.build")
	if err != nil {
		return nil, nil, err
	}
	images, err := filepath.Glob(filepath.Join(build, "images", "*.tar"))
	if err != nil {
		return nil, nil, err
	}
	o := cluster.Options{
		Name: "e2e", Dir: filepath.Join(build, "cluster", "e2e"), Bin: filepath.Join(build, "bin"),
		RootFS: filepath.Join(build, "image", "rootfs"), Nodes: 2, Images: images, ProxyMode: "nftables", Progress: os.Stdout,
	}
	// What an interrupted run has left behind goes first.
	if err := cluster.Down(ctx, o.Name, o.Dir); err != nil && !errors.Is(err, cluster.ErrNoCluster) {
		return nil, nil, err
	}
	c, err := cluster.Up(ctx, o)
	return c, func() error {
		return cluster.Down(context.WithoutCancel(ctx), o.Name, o.Dir)
	}, err
}

// begin gives a test a namespace of its own and checks in the end that its pods leave
// nothing behind on the nodes.
func begin(t *testing.T, limit time.Duration) (context.Context, *kit.Kit) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	k, err := admin.In(ctx, fmt.Sprintf("%.40s-%s", name, strings.ToLower(rand.Text()[:5])))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			dump(ctx, t, k)
		}
		// What would make pods again goes first, and the controller is gone: nobody moves them.
		if _, err := k.Kubectl(ctx, "delete", "deployments", "--all"); err != nil {
			t.Error(err)
		}
		pods, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			t.Error(err)
			return
		}
		for _, p := range pods.Items {
			if len(p.Finalizers) > 0 {
				if err := release(ctx, k, p.Name); err != nil {
					t.Error(err)
				}
			}
			if err := k.Delete(ctx, p.Name); err != nil {
				t.Error(err)
			}
		}
		if err := k.Client.CoreV1().Namespaces().Delete(ctx, k.Namespace, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		for _, node := range []string{node1, node2} {
			clean(ctx, t, node)
		}
	})
	return ctx, k
}

// dump tells what a failed test left on the API server and in the kubelets' logs.
func dump(ctx context.Context, t *testing.T, k *kit.Kit) {
	text, err := k.Kubectl(ctx, "get", "pods,events", "-o", "wide")
	t.Logf("in the end: %v\n%s", err, text)
	for _, node := range []string{node1, node2} {
		m, err := k.Cluster.Machine(node)
		if err != nil {
			t.Log(err)
			continue
		}
		b, err := os.ReadFile(filepath.Join(m.Logs(), "kubelet.log"))
		if err != nil {
			t.Log(err)
			continue
		}
		var mine []string
		for line := range strings.SplitSeq(string(b), "\n") {
			if strings.Contains(line, k.Namespace+"/") {
				mine = append(mine, line)
			}
		}
		t.Logf("kubelet of %s:\n%s", node, strings.Join(mine[max(0, len(mine)-60):], "\n"))
	}
}

// leftovers prints what a finished migration must not leave: records of the kubelet,
// sessions of the runtime, frozen processes and CRIU itself. The last line shows that
// the script ran to its end.
const leftovers = `
find /var/lib/kubelet/migrations -type f ! -name '.*' 2>/dev/null
find /run/containerd/io.containerd.grpc.v1.podmig-migration -mindepth 2 -type f 2>/dev/null
find /sys/fs/cgroup -name freezer.state 2>/dev/null | while read f; do s=$(cat $f 2>/dev/null); case "$s" in FROZEN|FREEZING) echo frozen $f;; esac; done
find /sys/fs/cgroup -name cgroup.freeze 2>/dev/null | while read f; do s=$(cat $f 2>/dev/null); case "$s" in 1) echo frozen $f;; esac; done
for p in /proc/[0-9]*; do case "$(cat $p/comm 2>/dev/null)" in criu) echo criu $p;; esac; done
echo end`

// clean fails the test if a node still has something of a migration.
func clean(ctx context.Context, t *testing.T, node string) {
	t.Helper()
	var last string
	for ctx.Err() == nil {
		var out bytes.Buffer
		err := admin.Cluster.Run(ctx, node, supervisor.Command{Args: []string{"sh", "-c", leftovers}, Stdout: &out})
		last = out.String()
		if err != nil {
			last += err.Error()
		}
		if err == nil && last == "end\n" {
			return
		}
		// Nothing tells when a kubelet has forgotten a pod.
		select {
		case <-ctx.Done():
		case <-time.After(300 * time.Millisecond):
		}
	}
	t.Errorf("left on %s:\n%s", node, last)
}
