//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// install brings the controller of PodMigration objects up, and removes it after the test.
func install(ctx context.Context, t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, args := range [][]string{{"delete", "--ignore-not-found", "namespace", "podmig-system"}, {"delete", "crd", "podmigrations.podmig.dev", "migratingpods.podmig.dev"}} {
			if _, err := admin.Kubectl(ctx, args...); err != nil {
				t.Error(err)
			}
		}
	})
	if err := admin.InstallController(ctx); err != nil {
		t.Fatal(err)
	}
}

// apply makes objects in the namespace of the test.
func apply(ctx context.Context, t *testing.T, k *kit.Kit, text string) {
	t.Helper()
	if err := k.Apply(ctx, text); err != nil {
		t.Fatal(err)
	}
}

// migrate calls kubectl's plugin and returns what it prints and the code that it ends with.
func migrate(ctx context.Context, t *testing.T, k *kit.Kit, args ...string) (out, progress string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	err := k.Cluster.Kubectl(ctx, supervisor.Command{Args: append([]string{"migrate", "-n", k.Namespace}, args...), Stdout: &o, Stderr: &e})
	var ended *supervisor.ExitError
	if errors.As(err, &ended) {
		code = ended.Code
	} else if err != nil {
		t.Fatal(err)
	}
	t.Logf("kubectl migrate %s: %d\n%s%s", strings.Join(args, " "), code, e.String(), o.String())
	return strings.TrimSpace(o.String()), e.String(), code
}

var migrationResource = v1alpha1.GroupVersion.WithResource("podmigrations")

// migrations reads all of a namespace.
func migrations(ctx context.Context, t *testing.T, k *kit.Kit) []v1alpha1.PodMigration {
	t.Helper()
	list, err := k.Dynamic.Resource(migrationResource).Namespace(k.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var all []v1alpha1.PodMigration
	for _, u := range list.Items {
		var m v1alpha1.PodMigration
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &m); err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
	return all
}

// Pods are moved by PodMigration objects, with kubectl's plugin.
func TestMigrate(t *testing.T) {
	ctx, k := begin(t, 5*time.Minute)
	install(ctx, t)
	t.Run("there and back", func(t *testing.T) {
		if err := k.Create(ctx, redisPod); err != nil {
			t.Fatal(err)
		}
		if _, err := k.WaitRunning(ctx, "redis-0"); err != nil {
			t.Fatal(err)
		}
		r := redis{k, "redis-0"}
		r.cli(ctx, t, "set", "key", "value")
		runID, _ := r.server(ctx, t)
		for _, target := range []string{"", node1} {
			args := []string{r.pod}
			if target != "" {
				args = append(args, target)
			}
			out, progress, code := migrate(ctx, t, k, args...)
			name, ok := strings.CutPrefix(out, "pod/redis-0-")
			if code != 0 || !ok || !strings.Contains(progress, "Succeeded") {
				t.Fatalf("it ended with %d, the new pod is %q", code, out)
			}
			// The clone runs before the source hears of it.
			if _, err := k.WaitPod(ctx, r.pod, "migrated", func(p *v1.Pod) (bool, error) { return p.Status.Reason == v1alpha1.ReasonMigrated, nil }); err != nil {
				t.Fatal(err)
			}
			r.pod = "redis-0-" + name
			if id, _ := r.server(ctx, t); id != runID || r.cli(ctx, t, "get", "key") != "value" {
				t.Error("it is another redis")
			}
		}
	})
	t.Run("what was measured", func(t *testing.T) {
		for _, m := range migrations(ctx, t, k) {
			if m.Status.TransferredBytes < 1<<10 || m.Status.FrozenMilliseconds == nil || *m.Status.FrozenMilliseconds <= 0 {
				t.Errorf("migration %s: %+v", m.Name, m.Status)
			}
		}
	})
	t.Run("dry run", func(t *testing.T) {
		p := start(ctx, t, k, "counter-0", counterPod(""))
		before := getJSON[counterState](ctx, t, p, 8080, "/status")
		out, _, code := migrate(ctx, t, k, p.Name, "--dry-run=server")
		if code != 0 || !strings.HasPrefix(out, "Pod counter-0 can move from node node1 to node node2, with the containers counter. They have ") {
			t.Errorf("a pod that can be moved: %d, %q", code, out)
		}
		start(ctx, t, k, "multipath", strings.Replace(counterPod(`{name: GODEBUG, value: "multipathtcp=2"}`), "counter-0", "multipath", 1))
		if _, progress, code := migrate(ctx, t, k, "multipath", "--dry-run=server"); code != 3 || !strings.Contains(progress, "multipath TCP") {
			t.Errorf("a pod that cannot: %d", code)
		}
		undisturbed(ctx, t, k, p, before)
		until(ctx, t, "the clones of the dry runs are gone", func() error {
			for _, m := range migrations(ctx, t, k) {
				if _, err := k.Pod(ctx, m.Status.ClonePodName); m.Spec.DryRun && !apierrors.IsNotFound(err) {
					return fmt.Errorf("clone %s is there: %w", m.Status.ClonePodName, err)
				}
			}
			return nil
		})
		for _, e := range k.Events(ctx, p.Name) {
			if e.Type == v1.EventTypeWarning && e.Reason != "Unhealthy" {
				t.Errorf("a dry run alarms: %s: %s", e.Reason, e.Message)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		if _, progress, code := migrate(ctx, t, k, "nobody"); code != 3 || !strings.Contains(progress, `no pod "nobody"`) {
			t.Errorf("a pod that does not exist: %d", code)
		}
		if _, progress, code := migrate(ctx, t, k, "redis-0"); code != 3 || !strings.Contains(progress, "only a running pod can be moved") {
			t.Errorf("a pod that was moved: %d", code)
		}
		if err := k.Create(ctx, strings.NewReplacer("redis-0", "host", "containers:", "volumes: [{name: v, hostPath: {path: /tmp}}]\n  containers:").Replace(redisPod)); err != nil {
			t.Fatal(err)
		}
		if _, err := k.WaitRunning(ctx, "host"); err != nil {
			t.Fatal(err)
		}
		if _, progress, code := migrate(ctx, t, k, "host"); code != 3 || !strings.Contains(progress, "the path /tmp of the source node") {
			t.Errorf("a pod with a hostPath: %d", code)
		}
		until(ctx, t, "the clone that failed is gone", func() error {
			pods, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: v1alpha1.LabelMigration})
			if err != nil || len(pods.Items) == 2 {
				return err
			}
			return fmt.Errorf("%d pods are clones, 2 of them run or have run", len(pods.Items))
		})
		if p, err := k.Pod(ctx, "host"); err != nil || p.Status.Phase != v1.PodRunning {
			t.Errorf("the pod is %v, %v", p, err)
		}
	})
	t.Run("cancelled and too long", func(t *testing.T) {
		selector := "--node-selector=there=none"
		if _, progress, code := migrate(ctx, t, k, "host", selector, "--timeout=2s"); code != 3 || !strings.Contains(progress, "No node took the clone in 2 seconds") {
			t.Errorf("a clone that finds no node: %d", code)
		}
		if out, _, code := migrate(ctx, t, k, "host", selector, "--no-wait"); code != 0 || !strings.HasPrefix(out, "podmigration.podmig.dev/host-") {
			t.Errorf("%d, %s", code, out)
		}
		if out, _, code := migrate(ctx, t, k, "host", "--cancel"); code != 0 || !strings.Contains(out, "cancelled") {
			t.Errorf("%d, %s", code, out)
		}
		for _, m := range migrations(ctx, t, k) {
			if !m.Status.Phase.Over() {
				t.Errorf("migration %s is %s", m.Name, m.Status.Phase)
			}
		}
	})
	t.Run("cancelled while memory is sent", func(t *testing.T) {
		if err := k.Create(ctx, ballastPod); err != nil {
			t.Fatal(err)
		}
		if _, err := k.WaitRunning(ctx, "ballast"); err != nil {
			t.Fatal(err)
		}
		if _, _, code := migrate(ctx, t, k, "ballast", "--no-wait"); code != 0 {
			t.Fatal(code)
		}
		until(ctx, t, "memory is sent", func() error {
			for _, m := range migrations(ctx, t, k) {
				if m.Spec.PodName == "ballast" && m.Status.Phase == v1alpha1.PhaseTransferring {
					return nil
				}
			}
			return errors.New("it is not yet")
		})
		if out, _, code := migrate(ctx, t, k, "ballast", "--cancel"); code != 0 || !strings.Contains(out, "cancelled") {
			t.Errorf("%d, %s", code, out)
		}
		p, err := k.Pod(ctx, "ballast")
		if err != nil || p.Status.Phase != v1.PodRunning || p.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("the pod is %v, %v", p, err)
		}
	})
	t.Run("no place on the target", func(t *testing.T) {
		// Whoever is created before the clone may take the place; whoever is created after it not.
		big := strings.NewReplacer("counter-0", "big", "imagePullPolicy: Never", "imagePullPolicy: Never\n    resources: {requests: {memory: BYTES}}").Replace(counterPod(""))
		n, err := k.Client.CoreV1().Nodes().Get(ctx, node2, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		more := fmt.Sprint(n.Status.Allocatable.Memory().Value()/2 + 1)
		p := start(ctx, t, k, "big", strings.Replace(big, "BYTES", more, 1))
		start(ctx, t, k, "other", strings.NewReplacer("name: big", "name: other", "node1", "node2", "BYTES", more).Replace(big))
		if _, progress, code := migrate(ctx, t, k, "big", "--timeout=2s"); code != 3 || !strings.Contains(progress, "Insufficient memory") {
			t.Errorf("with no place: %d", code)
		}
		if now, err := k.Pod(ctx, p.Name); err != nil || now.Status.Phase != v1.PodRunning {
			t.Errorf("the pod is %v, %v", now, err)
		}
		if err := k.Delete(ctx, "other"); err != nil {
			t.Fatal(err)
		}
		if out, _, code := migrate(ctx, t, k, "big"); code != 0 {
			t.Errorf("with a place: %d, %s", code, out)
		}
	})
	t.Run("freeze budget and eviction", func(t *testing.T) {
		writing := strings.NewReplacer("name: ballast}", "name: writing}", `value: "1500"`, `value: "300"`, "env: [", `env: [{name: BALLAST_DIRTY_MB_PER_SECOND, value: "3000"}, `).Replace(ballastPod)
		p := start(ctx, t, k, "writing", writing)
		if _, progress, code := migrate(ctx, t, k, p.Name, "--freeze-budget=5ms"); code != 4 || !strings.Contains(progress, "it may for 5ms: move it when it writes less") {
			t.Errorf("a pod that writes too much: %d", code)
		}
		now, err := k.Pod(ctx, p.Name)
		if err != nil || now.Status.Phase != v1.PodRunning || now.DeletionTimestamp != nil || now.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("the pod is %v, %v", now, err)
		}
		for _, e := range k.Events(ctx, p.Name) {
			if e.Reason == v1alpha1.EventFrozen {
				t.Error("it was frozen")
			}
		}
		if _, _, code := migrate(ctx, t, k, p.Name, "--freeze-budget=5ms", "--on-failure=Evict"); code != 4 {
			t.Errorf("with eviction: %d", code)
		}
		until(ctx, t, "it is evicted", func() error {
			_, err := k.Pod(ctx, p.Name)
			if apierrors.IsNotFound(err) {
				return nil
			}
			return fmt.Errorf("it is there: %w", err)
		})
	})
	t.Run("the controller's metrics", func(t *testing.T) {
		list, err := k.Client.CoreV1().Pods("podmig-system").List(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for i := range list.Items {
			text, err := ask(ctx, http.MethodGet, &list.Items[i], 8080, "/metrics")
			found = found || err == nil && strings.Contains(text, `controller_runtime_reconcile_total{controller="podmigration"`)
			if _, err := ask(ctx, http.MethodGet, &list.Items[i], 8081, "/healthz"); err != nil {
				t.Error(err)
			}
		}
		if !found {
			t.Error("nobody serves metrics of migrations")
		}
	})
	t.Run("validation", func(t *testing.T) {
		for text, spec := range map[string]map[string]any{
			"not both":     {"podName": "redis-0", "targetNode": "node1", "nodeSelector": map[string]any{"a": "b"}},
			"spec.podName": {"targetNode": "node1"},
		} {
			u := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
			u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodMigration"))
			u.SetName("wrong")
			_, err := k.Dynamic.Resource(migrationResource).Namespace(k.Namespace).Create(ctx, u, metav1.CreateOptions{})
			if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), text) {
				t.Errorf("%v: %v", spec, err)
			}
		}
	})
}

// ballastPod has so much memory that sending it takes seconds.
const ballastPod = `
apiVersion: v1
kind: Pod
metadata: {name: ballast}
spec:
  nodeName: node1
  containers:
  - name: ballast
    image: podmig.dev/ballast:v1
    imagePullPolicy: Never
    env: [{name: BALLAST_MB, value: "1500"}]
    readinessProbe: {httpGet: {path: /check, port: 8080}, timeoutSeconds: 10}
`

const countingPod = `
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: many}}
spec:
  nodeName: node1
  containers:
  - {name: counter, image: podmig.dev/counter:v1, imagePullPolicy: Never}
`

// Ten at once, two of which may run at a time, with a controller that is killed meanwhile.
func TestMigrateMany(t *testing.T) {
	ctx, k := begin(t, 5*time.Minute)
	install(ctx, t)
	const count, limit = 10, 2
	for i := range count {
		if err := k.Create(ctx, fmt.Sprintf(countingPod, fmt.Sprint("many-", i))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range count {
		if _, err := k.WaitRunning(ctx, fmt.Sprint("many-", i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range count {
		if _, _, code := migrate(ctx, t, k, fmt.Sprint("many-", i), "--no-wait"); code != 0 {
			t.Fatal(code)
		}
	}
	killed := false
	until(ctx, t, "all have moved", func() error {
		left := 0
		for _, m := range migrations(ctx, t, k) {
			switch {
			case m.Status.Phase == v1alpha1.PhaseSucceeded:
			case m.Status.Phase.Over():
				t.Fatalf("%s ended %s %s: %s", m.Name, m.Status.Phase, m.Status.Reason, m.Status.Message)
			default:
				left++
			}
		}
		if left > 0 && left < count-2 && !killed {
			killed = true
			if _, err := k.Kubectl(ctx, "-n", "podmig-system", "delete", "pods", "--all", "--grace-period=0", "--force"); err != nil {
				t.Fatal(err)
			}
		}
		if left > 0 {
			return fmt.Errorf("%d have not", left)
		}
		return nil
	})
	if !killed {
		t.Error("the controller was not killed in the middle")
	}
	clones, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: v1alpha1.LabelMigration})
	if err != nil || len(clones.Items) != count {
		t.Errorf("%d clones, %v", len(clones.Items), err)
	}
	// When each began and ended, read from the record.
	type change struct {
		at time.Time
		by int
	}
	var changes []change
	for _, m := range migrations(ctx, t, k) {
		for _, p := range m.Status.PhaseTransitions {
			switch p.Phase {
			case v1alpha1.PhaseScheduling:
				changes = append(changes, change{p.Time.Time, 1})
			case v1alpha1.PhaseSucceeded:
				changes = append(changes, change{p.Time.Time, -1})
			}
		}
	}
	if len(changes) != 2*count {
		t.Fatalf("%d of %d transitions are recorded", len(changes), 2*count)
	}
	for _, c := range changes {
		running := 0
		for _, d := range changes {
			if !d.at.After(c.at) {
				running += d.by
			}
		}
		if running > limit {
			t.Errorf("%d ran at %s", running, c.at)
		}
	}
}
