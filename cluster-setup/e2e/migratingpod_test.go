//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// isRunning waits until the active pod of a MigratingPod is this one, and ready.
func isRunning(ctx context.Context, t *testing.T, k *kit.Kit, name, pod string) *v1alpha1.MigratingPod {
	t.Helper()
	var mp *v1alpha1.MigratingPod
	until(ctx, t, fmt.Sprintf("%s runs as %s", name, pod), func() error {
		mp = migratingPod(ctx, t, k, name)
		if mp.Status.State != v1alpha1.StateRunning || mp.Status.ActivePod != pod || !apimeta.IsStatusConditionTrue(mp.Status.Conditions, v1alpha1.ConditionReady) {
			return fmt.Errorf("it is %+v", mp.Status)
		}
		return nil
	})
	return mp
}

// What becomes of a MigratingPod whose pod is deleted in other ways than a drain.
func TestMigratingPod(t *testing.T) {
	ctx, k := begin(t, 4*time.Minute)
	install(ctx, t)
	named := func(name string) string {
		return strings.ReplaceAll(migratingRedis, "{name: redis}", "{name: "+name+"}")
	}
	t.Run("deleted again while it moves", func(t *testing.T) {
		apply(ctx, t, k, named("twice"))
		isRunning(ctx, t, k, "twice", "twice-0")
		id, _ := redis{k, "twice-0"}.server(ctx, t)
		remove(ctx, t, k, "twice-0")
		until(ctx, t, "there is a clone", func() error { _, err := k.Pod(ctx, "twice-1"); return err })
		until(ctx, t, "the clone is on a node", func() error {
			p, err := k.Pod(ctx, "twice-1")
			if err == nil && p.Spec.NodeName == "" {
				err = fmt.Errorf("it is on none")
			}
			return err
		})
		remove(ctx, t, k, "twice-1")
		mp := isRunning(ctx, t, k, "twice", "twice-2")
		if now, _ := (redis{k, "twice-2"}).server(ctx, t); now != id {
			t.Error("it is another redis")
		}
		if mp.Status.Moves != 2 || apimeta.IsStatusConditionTrue(mp.Status.Conditions, v1alpha1.ConditionColdStarted) {
			t.Errorf("it is %+v", mp.Status)
		}
	})
	t.Run("by force", func(t *testing.T) {
		remove(ctx, t, k, "twice-2", 0)
		mp := isRunning(ctx, t, k, "twice", "twice-3")
		c := apimeta.FindStatusCondition(mp.Status.Conditions, v1alpha1.ConditionColdStarted)
		if c == nil || c.Status != metav1.ConditionTrue || !strings.Contains(c.Message, "twice-2") {
			t.Errorf("that it started cold is told as %+v", c)
		}
		until(ctx, t, "there is an event", func() error {
			list, err := k.Client.CoreV1().Events(k.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "reason=ColdStarted"})
			if err == nil && len(list.Items) == 0 {
				err = fmt.Errorf("there is none")
			}
			return err
		})
	})
	t.Run("with no other node until the deadline", func(t *testing.T) {
		apply(ctx, t, k, strings.Replace(named("late"), "spec:", "spec:\n  strategy: {deadlineSeconds: 4}", 1))
		isRunning(ctx, t, k, "late", "late-0")
		id, _ := redis{k, "late-0"}.server(ctx, t)
		if _, err := k.Kubectl(ctx, "cordon", node2); err != nil {
			t.Fatal(err)
		}
		uncordon := func() error { _, err := k.Kubectl(ctx, "uncordon", node2); return err }
		defer uncordon()
		begin := time.Now()
		remove(ctx, t, k, "late-0")
		waits := false
		until(ctx, t, "it has ended", func() error {
			mp := migratingPod(ctx, t, k, "late")
			waits = waits || mp.Status.State == v1alpha1.StateMigrating || mp.Status.State == v1alpha1.StateMigrationPending
			if _, err := k.Pod(ctx, "late-0"); !apierrors.IsNotFound(err) {
				return fmt.Errorf("it is there: %w", err)
			}
			return nil
		})
		if took := time.Since(begin); !waits || took < 3*time.Second {
			t.Errorf("it ended after %s, and waited to be moved: %v", took, waits)
		}
		if err := uncordon(); err != nil {
			t.Fatal(err)
		}
		var pod string
		until(ctx, t, "another one runs", func() error {
			mp := migratingPod(ctx, t, k, "late")
			pod = mp.Status.ActivePod
			if mp.Status.State != v1alpha1.StateRunning || !apimeta.IsStatusConditionTrue(mp.Status.Conditions, v1alpha1.ConditionColdStarted) {
				return fmt.Errorf("it is %+v", mp.Status)
			}
			return nil
		})
		if _, err := k.WaitRunning(ctx, pod); err != nil {
			t.Fatal(err)
		}
		if now, _ := (redis{k, pod}).server(ctx, t); now == id {
			t.Error("it is the same redis")
		}
	})
	t.Run("deleted itself", func(t *testing.T) {
		begin := time.Now()
		if _, err := k.Kubectl(ctx, "delete", "migratingpods", "--all", "--timeout=30s"); err != nil {
			t.Fatal(err)
		}
		until(ctx, t, "its pods are gone", func() error {
			list, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{})
			if err == nil && len(list.Items) > 0 {
				err = fmt.Errorf("%d are there", len(list.Items))
			}
			return err
		})
		// The garbage collector looks for kinds that are new to it every 30 seconds. A pod that waited for
		// its deadline would take ten minutes.
		if took := time.Since(begin); took > time.Minute {
			t.Errorf("that took %s", took)
		}
		until(ctx, t, "its migrations are gone", func() error {
			if all := migrations(ctx, t, k); len(all) > 0 {
				return fmt.Errorf("%d are there", len(all))
			}
			return nil
		})
	})
	t.Run("in a namespace that is deleted", func(t *testing.T) {
		other, err := admin.In(ctx, k.Namespace+"-2")
		if err != nil {
			t.Fatal(err)
		}
		apply(ctx, t, other, named("inside"))
		isRunning(ctx, t, other, "inside", "inside-0")
		waiting(ctx, t, other, "bare", 600)
		if _, err := admin.Kubectl(ctx, "delete", "namespace", other.Namespace, "--timeout=60s"); err != nil {
			t.Error(err)
		}
	})
	t.Run("validation", func(t *testing.T) {
		for text, change := range map[string]func(u *unstructured.Unstructured){
			"must be Always": func(u *unstructured.Unstructured) {
				unstructured.SetNestedField(u.Object, "Never", "spec", "template", "spec", "restartPolicy")
			},
			"every deletion is a forced one": func(u *unstructured.Unstructured) {
				unstructured.SetNestedField(u.Object, int64(0), "spec", "template", "spec", "terminationGracePeriodSeconds")
			},
			"room for the numbers": func(u *unstructured.Unstructured) { u.SetName(strings.Repeat("x", 241)) },
			"spec.template.spec": func(u *unstructured.Unstructured) {
				unstructured.RemoveNestedField(u.Object, "spec", "template", "spec", "containers")
			},
			"less than or equal to 86400": func(u *unstructured.Unstructured) {
				unstructured.SetNestedField(u.Object, int64(1e6), "spec", "strategy", "deadlineSeconds")
			},
		} {
			u := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{
				"containers": []any{map[string]any{"name": "c", "image": "i"}},
			}}}}}
			u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("MigratingPod"))
			u.SetName("wrong")
			change(u)
			_, err := k.Dynamic.Resource(v1alpha1.GroupVersion.WithResource("migratingpods")).Namespace(k.Namespace).Create(ctx, u, metav1.CreateOptions{})
			if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v", text, err)
			}
		}
	})
}

// kubectl migrate --from empties a node, and respects a PodDisruptionBudget.
func TestMigrateFrom(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	install(ctx, t)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		if _, err := k.Kubectl(ctx, "uncordon", node1); err != nil {
			t.Error(err)
		}
	})
	const count = 3
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
	apply(ctx, t, k, `
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: many}
spec:
  minAvailable: 2
  selector: {matchLabels: {app: many}}
`)
	until(ctx, t, "the budget is known", func() error {
		b, err := k.Client.PolicyV1().PodDisruptionBudgets(k.Namespace).Get(ctx, "many", metav1.GetOptions{})
		if err == nil && b.Status.DisruptionsAllowed != 1 {
			err = fmt.Errorf("it allows %d", b.Status.DisruptionsAllowed)
		}
		return err
	})
	out, _, code := migrate(ctx, t, k, "--from", node1)
	if code != 0 {
		t.Errorf("it ended with %d", code)
	}
	n, err := k.Client.CoreV1().Nodes().Get(ctx, node1, metav1.GetOptions{})
	if err != nil || !n.Spec.Unschedulable {
		t.Errorf("the node takes pods, %v", err)
	}
	// With a budget of one they moved one after the other.
	type span struct{ from, to time.Time }
	var spans []span
	for _, m := range migrations(ctx, t, k) {
		if m.Status.Phase != v1alpha1.PhaseSucceeded || !strings.Contains(out, m.Spec.PodName) {
			t.Errorf("%s ended %s: %s", m.Spec.PodName, m.Status.Phase, m.Status.Message)
		}
		spans = append(spans, span{m.CreationTimestamp.Time, m.Status.PhaseTransitions[len(m.Status.PhaseTransitions)-1].Time.Time})
	}
	slices.SortFunc(spans, func(a, b span) int { return a.to.Compare(b.to) })
	for i := 1; i < len(spans); i++ {
		// Creation times are whole seconds.
		if spans[i].from.Add(time.Second).Before(spans[i-1].to) {
			t.Errorf("one began at %s, before another had ended at %s", spans[i].from, spans[i-1].to)
		}
	}
	if len(spans) != count {
		t.Errorf("%d migrations", len(spans))
	}
}

// A cluster whose gate is off is upstream's, also with podmig's controller and finalizers.
func TestGateOff(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	build, err := filepath.Abs("../../.build")
	if err != nil {
		t.Fatal(err)
	}
	var images []string
	for _, name := range []string{"pause", "coredns", "counter", "controller"} {
		images = append(images, filepath.Join(build, "images", name+".tar"))
	}
	o := cluster.Options{
		Name: "e2e-off", Dir: filepath.Join(build, "cluster", "e2e-off"), Bin: filepath.Join(build, "bin"), RootFS: filepath.Join(build, "image", "rootfs"),
		Nodes: 2, Images: images, ProxyMode: "nftables", FeatureGates: map[string]bool{"PodMigration": false},
	}
	// What an interrupted run has left behind goes first.
	_ = cluster.Down(ctx, o.Name, o.Dir)
	c, err := cluster.Up(ctx, o)
	t.Cleanup(func() {
		if err := cluster.Down(context.WithoutCancel(ctx), o.Name, o.Dir); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	k, err := kit.New(c, metav1.NamespaceDefault)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.InstallController(ctx); err != nil {
		t.Fatal(err)
	}
	p := start(ctx, t, k, "counter-0", counterPod(""))
	t.Run("the field is unknown", func(t *testing.T) {
		clone := strings.NewReplacer("counter-0", "counter-1", "nodeName: node1", "nodeName: node2\n  clonePod: counter-0").Replace(counterPod(""))
		if c := start(ctx, t, k, "counter-1", clone); c.Spec.ClonePod != "" {
			t.Errorf("the pod clones %q", c.Spec.ClonePod)
		}
		if now, err := k.Pod(ctx, "counter-0"); err != nil || now.Status.Phase != v1.PodRunning {
			t.Errorf("the other one is %v, %v", now, err)
		}
	})
	t.Run("a migration is refused", func(t *testing.T) {
		if _, progress, code := migrate(ctx, t, k, p.Name); code != 3 || !strings.Contains(progress, "switch on the feature gate PodMigration") {
			t.Errorf("it ended with %d", code)
		}
		if list, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: v1alpha1.LabelMigration}); err != nil || len(list.Items) != 0 {
			t.Errorf("%d clones, %v", len(list.Items), err)
		}
	})
	t.Run("a drain kills and replaces", func(t *testing.T) {
		apply(ctx, t, k, webDeployment)
		if _, err := k.Kubectl(ctx, "rollout", "status", "--timeout=30s", "deployment/web"); err != nil {
			t.Fatal(err)
		}
		before, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			t.Fatal(err)
		}
		on := 0
		for _, p := range before.Items {
			if p.Spec.NodeName == node1 {
				on++
			}
		}
		if on == 0 {
			t.Fatal("no pod is on the node")
		}
		if _, err := k.Kubectl(ctx, "drain", node1, "--timeout=60s", "--pod-selector=app=web"); err != nil {
			t.Fatal(err)
		}
		settled(ctx, t, k, 3)
		after, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			t.Fatal(err)
		}
		fresh := 0
		for _, p := range after.Items {
			if p.Labels[v1alpha1.LabelMigration] != "" || p.Spec.ClonePod != "" {
				t.Errorf("pod %s is a clone", p.Name)
			}
			if !slices.ContainsFunc(before.Items, func(old v1.Pod) bool { return old.UID == p.UID }) {
				fresh++
			}
		}
		if fresh != on {
			t.Errorf("%d pods are new, %d were on the node", fresh, on)
		}
	})
}

// The node of a MigratingPod is lost: as long as nobody says that it is off, its pod may
// still run, so no other one is started. Then it starts from the template and says so.
func TestNodeLost(t *testing.T) {
	ctx, k := begin(t, 4*time.Minute)
	install(ctx, t)
	apply(ctx, t, k, migratingRedis)
	isRunning(ctx, t, k, "redis", "redis-0")
	if p, err := k.Pod(ctx, "redis-0"); err != nil || p.Spec.NodeName != node1 {
		t.Fatalf("it is %v, %v", p, err)
	}
	if err := k.Cluster.SetLink(node1, false); err != nil {
		t.Fatal(err)
	}
	nodes := k.Client.CoreV1().Nodes()
	taint := func(ctx context.Context, suffix string) error {
		_, err := k.Kubectl(ctx, "taint", "node", node1, v1.TaintNodeOutOfService+suffix)
		return err
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if err := k.Cluster.SetLink(node1, true); err != nil {
			t.Error(err)
		}
		_ = taint(ctx, "-")
		until(ctx, t, "the node is back", func() error {
			n, err := nodes.Get(ctx, node1, metav1.GetOptions{})
			if err == nil && (nodeReady(n) != v1.ConditionTrue || len(n.Spec.Taints) > 0) {
				err = fmt.Errorf("it is %v with %v", nodeReady(n), n.Spec.Taints)
			}
			return err
		})
	})
	until(ctx, t, "nothing is heard of the node", func() error {
		n, err := nodes.Get(ctx, node1, metav1.GetOptions{})
		if err == nil && nodeReady(n) != v1.ConditionUnknown {
			err = fmt.Errorf("it is ready: %s", nodeReady(n))
		}
		return err
	})
	remove(ctx, t, k, "redis-0")
	until(ctx, t, "it is to move", func() error {
		mp := migratingPod(ctx, t, k, "redis")
		if mp.Status.State != v1alpha1.StateMigrationPending && mp.Status.State != v1alpha1.StateMigrating {
			return fmt.Errorf("it is %+v", mp.Status)
		}
		return nil
	})
	if err := taint(ctx, "=nodeshutdown:NoExecute"); err != nil {
		t.Fatal(err)
	}
	var mp *v1alpha1.MigratingPod
	until(ctx, t, "another one runs", func() error {
		mp = migratingPod(ctx, t, k, "redis")
		if mp.Status.State != v1alpha1.StateRunning || mp.Status.NodeName != node2 || !apimeta.IsStatusConditionTrue(mp.Status.Conditions, v1alpha1.ConditionColdStarted) {
			return fmt.Errorf("it is %+v", mp.Status)
		}
		return nil
	})
	if mp.Status.Moves != 0 {
		t.Errorf("it has moved %d times", mp.Status.Moves)
	}
}

func nodeReady(n *v1.Node) v1.ConditionStatus {
	i := slices.IndexFunc(n.Status.Conditions, func(c v1.NodeCondition) bool { return c.Type == v1.NodeReady })
	if i < 0 {
		return v1.ConditionUnknown
	}
	return n.Status.Conditions[i].Status
}
