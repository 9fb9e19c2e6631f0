//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/kubelet/wire"
	"podmig.dev/podmig/tools/clone"
)

// checkpoint calls kubectl's plugin and returns what it prints and the code that it ends with.
func checkpoint(ctx context.Context, t *testing.T, k *kit.Kit, args ...string) (out, progress string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	err := k.Cluster.Kubectl(ctx, supervisor.Command{Args: append([]string{"checkpoint", "-n", k.Namespace}, args...), Stdout: &o, Stderr: &e})
	var ended *supervisor.ExitError
	if errors.As(err, &ended) {
		code = ended.Code
	} else if err != nil {
		t.Fatal(err)
	}
	t.Logf("kubectl checkpoint %s: %d\n%s%s", strings.Join(args, " "), code, e.String(), o.String())
	return strings.TrimSpace(o.String()), e.String(), code
}

// checkpointPod keeps what it writes in an emptyDir, and would be restarted if its
// probes met it frozen.
var checkpointPod = strings.NewReplacer("  containers:", "  volumes: [{name: data, emptyDir: {}}]\n  containers:",
	"    imagePullPolicy: Never", "    imagePullPolicy: Never\n    volumeMounts: [{name: data, mountPath: /data}]").Replace(redisPod)

// holds tells whether an archive's stream has some bytes.
func holds(t *testing.T, path string, want []byte) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := tar.NewReader(f)
	if _, err := r.Next(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(b, want)
}

// nothingKept checks that a kubelet has no checkpoint any more.
func nothingKept(ctx context.Context, t *testing.T, node string) {
	t.Helper()
	if s := inNode(ctx, t, node, "if test -d /var/lib/kubelet/podcheckpoints; then find /var/lib/kubelet/podcheckpoints -mindepth 1; stat -c %a /var/lib/kubelet/podcheckpoints; fi"); s != "" && s != "700" {
		t.Errorf("left on %s: %s", node, s)
	}
}

// kubeletSays sends a request to the kubelet of node1 with somebody's certificate. The
// answer's body is not read yet.
func kubeletSays(ctx context.Context, t *testing.T, identity *tls.Config, method, path string) *http.Response {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: identity, DialContext: hubDial, DisableKeepAlives: true}}
	r, err := http.NewRequestWithContext(ctx, method, "https://"+kubeletAddress(ctx, t, node1)+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// text is all of an answer.
func text(t *testing.T, resp *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A checkpoint of a pod has its memory and its files, and the pod runs on.
func TestCheckpoint(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "redis-0", checkpointPod)
	r := redis{k, p.Name}
	// Compressible values would do, too, but these can be searched for.
	r.cli(ctx, t, "eval", `for i=1,100000 do redis.call('set','key:'..i,'value:'..i..string.rep('x',100)) end return 1`, "0")
	r.cli(ctx, t, "set", "secret", "only-in-the-memory-of-the-redis")
	execIn(ctx, t, k, p.Name, "redis", "sh", "-c", "printf %s%s only-in-the- volume >/data/file")
	runID, _ := r.server(ctx, t)
	dir := t.TempDir()
	t.Cleanup(func() {
		nothingKept(context.WithoutCancel(ctx), t, node1)
		nothingKept(context.WithoutCancel(ctx), t, node2)
	})

	path := filepath.Join(dir, "redis.tar")
	out, progress, code := checkpoint(ctx, t, k, p.Name, path, "-o", "json")
	var report struct {
		Path, Node, Digest string
		Bytes              int64
		Containers         []string
	}
	if err := json.Unmarshal([]byte(out), &report); code != 0 || err != nil || report.Path != path || report.Node != node1 ||
		len(report.Containers) != 1 || report.Containers[0] != "redis" || !strings.HasPrefix(report.Digest, "sha256:") {
		t.Fatalf("it ended with %d, %v", code, err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 || st.Size() != report.Bytes || st.Size() < 10<<20 {
		t.Errorf("the file: %v, %v", st, err)
	}
	if !strings.Contains(progress, "the pod runs on") || !strings.Contains(progress, "MiB/s") {
		t.Error("it does not tell how far it is")
	}
	for _, want := range []string{"only-in-the-memory-of-the-redis", "only-in-the-volume"} {
		if !holds(t, path, []byte(want)) {
			t.Errorf("the checkpoint lacks %q", want)
		}
	}

	// A second one at once, into a directory.
	out, _, code = checkpoint(ctx, t, k, p.Name, dir+"/")
	if code != 0 || !strings.HasPrefix(out, filepath.Join(dir, "redis-0-20")) {
		t.Errorf("a second one: %d, %q", code, out)
	}

	// What exists is not replaced without being told to.
	if _, progress, code := checkpoint(ctx, t, k, p.Name, path); code != 1 || !strings.Contains(progress, "give --force") {
		t.Errorf("an existing file: %d", code)
	}
	if _, _, code := checkpoint(ctx, t, k, p.Name, path, "--force"); code != 0 {
		t.Errorf("with force: %d", code)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
		t.Errorf("files: %v, %v", files, err)
	}

	// Two at the same time: each is a whole one, or is told to wait.
	codes := make(chan int, 2)
	for i := range cap(codes) {
		go func() {
			var e bytes.Buffer
			err := k.Cluster.Kubectl(ctx, supervisor.Command{
				Args:   []string{"checkpoint", "-n", k.Namespace, p.Name, filepath.Join(dir, fmt.Sprintf("both-%d.tar", i))},
				Stdout: io.Discard, Stderr: &e,
			})
			var ended *supervisor.ExitError
			switch {
			case err == nil:
				codes <- 0
			case errors.As(err, &ended) && ended.Code == 3 && strings.Contains(e.String(), "is being taken"):
				codes <- 3
			default:
				t.Errorf("at the same time: %v: %s", err, e.String())
				codes <- 1
			}
		}()
	}
	done := 0
	for range cap(codes) {
		if <-codes == 0 {
			done++
		}
	}
	if files, err := filepath.Glob(filepath.Join(dir, "both-*")); err != nil || done == 0 || len(files) != done {
		t.Errorf("%d of two at the same time were taken, files %q, %v", done, files, err)
	}

	// A client that takes nothing keeps neither the pod frozen nor anything on the disk.
	grant(ctx, t, k, "slow", "slow", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/checkpoint"}, Verbs: []string{"create"}})
	slow, route := issue(t, "slow"), wire.PodCheckpoints+k.Namespace+"/"+p.Name
	var sent *http.Response
	until(ctx, t, "the right is known", func() error {
		if sent = kubeletSays(ctx, t, slow, http.MethodPost, route); sent.StatusCode != http.StatusOK {
			return errors.New(text(t, sent))
		}
		return nil
	})
	if id, _ := r.server(ctx, t); id != runID {
		t.Error("it is another redis")
	}
	nothingKept(ctx, t, node1)
	if again := kubeletSays(ctx, t, slow, http.MethodPost, route); again.StatusCode != http.StatusConflict || !strings.Contains(text(t, again), "is being taken or sent") {
		t.Errorf("while it is sent: %s", again.Status)
	}
	sent.Body.Close()

	// It is the same redis, and nobody has noticed.
	if id, _ := r.server(ctx, t); id != runID || r.cli(ctx, t, "get", "key:100000") == "" {
		t.Error("it is another redis")
	}
	now, err := k.Pod(ctx, p.Name)
	if err != nil {
		t.Fatal(err)
	}
	if s := now.Status.ContainerStatuses[0]; s.RestartCount != 0 || !s.Ready {
		t.Errorf("the container: %s", s.String())
	}
	until(ctx, t, "there is an event", func() error {
		n := 0
		for _, e := range k.Events(ctx, p.Name) {
			if e.Type == v1.EventTypeNormal && e.Reason == "Checkpointed" && strings.Contains(e.Message, `for user "kube-apiserver-kubelet-client"`) {
				n++
			}
		}
		if n == 0 {
			return fmt.Errorf("none among %v", k.Events(ctx, p.Name))
		}
		return nil
	})
	if n := logged(t, node1, "Served the checkpoint of a pod", k.Namespace+"/redis-0", `caller="kube-apiserver-kubelet-client"`); n != 3+done {
		t.Errorf("the kubelet has logged %d lines", n)
	}

	// And it still moves.
	r.pod = move(ctx, t, k, p.Name, "redis-1", node2).Name
	if id, _ := r.server(ctx, t); id != runID {
		t.Error("it is another redis")
	}
}

// What cannot be checkpointed is refused with the reason, and runs on.
func TestCheckpointIsRefused(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	dir := t.TempDir()
	path := filepath.Join(dir, "x.tar")
	t.Cleanup(func() {
		if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
			t.Errorf("files: %v, %v", files, err)
		}
		nothingKept(context.WithoutCancel(ctx), t, node1)
	})
	p := start(ctx, t, k, "counter-0", counterPod(""))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	refused := func(what, pod, text string, args ...string) {
		t.Helper()
		if _, progress, code := checkpoint(ctx, t, k, append([]string{pod, path}, args...)...); code != 3 || !strings.Contains(progress, text) {
			t.Errorf("%s: %d, not refused with %q", what, code, text)
		}
	}
	refused("a pod that does not exist", "nobody", `pods "nobody" not found`)

	// Users without the right, one of whom may read everything of nodes.
	grant(ctx, t, k, "pods", "mallory", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods", "pods/exec", "nodes/checkpoint"}, Verbs: []string{"*"}})
	grant(ctx, t, k, "read", "reader", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods", "nodes/proxy"}, Verbs: []string{"get"}})
	for _, user := range []string{"mallory", "reader"} {
		other, err := k.As(user)
		if err != nil {
			t.Fatal(err)
		}
		until(ctx, t, user+" may read the pod", func() error { _, err := other.Pod(ctx, p.Name); return err })
		refused(user, p.Name, `cannot create resource "nodes/proxy"`, "--as", user)
	}
	reader, err := k.As("reader")
	if err != nil {
		t.Fatal(err)
	}
	get := reader.Client.CoreV1().RESTClient().Get().AbsPath("/api/v1/nodes", node1, "proxy", wire.PodCheckpoints, k.Namespace, p.Name)
	if _, err := get.DoRaw(ctx); err == nil || apierrors.IsNotFound(err) {
		t.Errorf("by reading: %v", err)
	}
	refused("a node", p.Name, "forbidden", "--as", "system:node:"+node2, "--as-group", "system:nodes")
	thief, err := k.As("system:node:"+node2, "system:nodes")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := thief.Client.CoreV1().RESTClient().Post().AbsPath("/api/v1/nodes", node1, "proxy", wire.PodCheckpoints, k.Namespace, p.Name).DoRaw(ctx); !apierrors.IsForbidden(err) {
		t.Errorf("by a node through the API server: %v", err)
	}

	// At the kubelet itself: other nodes, this node, and users who have everything else.
	peter := issue(t, "peter")
	grant(ctx, t, k, "proxy", "peter", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/proxy", "nodes/migration"}, Verbs: []string{"*"}})
	send := func(identity *tls.Config, method, path string) (int, string) {
		t.Helper()
		resp := kubeletSays(ctx, t, identity, method, path)
		return resp.StatusCode, text(t, resp)
	}
	until(ctx, t, "peter may list the pods of the node", func() error {
		if code, b := send(peter, http.MethodGet, "/pods"); code != http.StatusOK {
			return fmt.Errorf("status %d: %s", code, b)
		}
		return nil
	})
	route := wire.PodCheckpoints + k.Namespace + "/" + p.Name
	for name, identity := range map[string]*tls.Config{"node2": stolen(t, node2), "node1": stolen(t, node1), "peter": peter, "nobody": issue(t, "nobody")} {
		for _, path := range []string{route, "/migration/.." + route, "/pods/.." + route} {
			if code, b := send(identity, http.MethodPost, path); code != http.StatusForbidden {
				t.Errorf("%s by %s: status %d: %s", path, name, code, b)
			}
		}
	}
	if code, b := send(clientTLS(t, nil, nil), http.MethodPost, route); code != http.StatusUnauthorized {
		t.Errorf("without a certificate: status %d: %s", code, b)
	}
	// A node that was granted the right by mistake.
	grant(ctx, t, k, "mistake", "system:node:"+node2, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/checkpoint"}, Verbs: []string{"*"}})
	until(ctx, t, "the kubelet refuses a node that has the right", func() error {
		if code, b := send(stolen(t, node2), http.MethodPost, route); code != http.StatusForbidden {
			t.Fatalf("status %d: %s", code, b)
		} else if !strings.Contains(b, "is a node") {
			return errors.New(b)
		}
		return nil
	})
	undisturbed(ctx, t, k, p, before)
	for _, e := range k.Events(ctx, p.Name) {
		if e.Reason == "Checkpointed" {
			t.Errorf("somebody got it: %s", e.Message)
		}
	}

	// A pod that moves: node3 has it frozen.
	const node3 = "node3"
	nodeThatMoves(ctx, t, k, node3)
	o := clone.Options{Name: p.Name + "-clone", Node: node3}
	if err := k.Clone(ctx, p.Name, o, bindTo(node3)); err != nil {
		t.Fatal(err)
	}
	c, err := k.Pod(ctx, o.Name)
	if err != nil {
		t.Fatal(err)
	}
	s := wire.Session{Namespace: k.Namespace, Pod: p.Name, ID: string(c.UID)}
	target := asPeer(ctx, t, node1, issue(t, "system:node:"+node3, "system:nodes"))
	until(ctx, t, "node3 may open the session", func() error { _, err := target.Open(ctx, s, openRequest(p, node3)); return err })
	refused("a pod that moves", p.Name, "is moving to another node")
	if err := target.Abort(ctx, s, &wire.FailureRequest{Reason: "Cancelled", Message: "the test has seen enough"}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Kubectl(ctx, "delete", "pod", c.Name, "--grace-period=0", "--force"); err != nil {
		t.Fatal(err)
	}

	// A pod that has ended.
	if err := k.Create(ctx, strings.NewReplacer("redis-0", "ended", "    imagePullPolicy: Never", "    imagePullPolicy: Never\n    command: [sh, -c, exit 0]", "  containers:", "  restartPolicy: Never\n  containers:").Replace(redisPod)); err != nil {
		t.Fatal(err)
	}
	if _, err := k.WaitPod(ctx, "ended", "ended", func(p *v1.Pod) (bool, error) { return p.Status.Phase == v1.PodSucceeded, nil }); err != nil {
		t.Fatal(err)
	}
	refused("a pod that has ended", "ended", "is Succeeded, not Running")

	// A kubelet that was killed in the middle leaves something, and removes it when it starts.
	inNode(ctx, t, node2, "mkdir -p -m 700 /var/lib/kubelet/podcheckpoints/pod-1; echo secret >/var/lib/kubelet/podcheckpoints/pod-1/checkpoint.stream")
	onNode2 := start(ctx, t, k, "counter-1", strings.NewReplacer("counter-0", "counter-1", "nodeName: node1", "nodeName: node2").Replace(counterPod("")))
	back := change(ctx, t, node2, gateOff, gateOn, "kubelet")
	nothingKept(ctx, t, node2)
	refused("a node with the gate off", onNode2.Name, "serves no checkpoints of pods")
	back()
	nodeDeclares(ctx, t, k, true)
}
