package migrate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// drain is a run of the command for node1. The test is the controller.
type drain struct {
	t           *testing.T
	c           client.WithWatch
	out, errOut bytes.Buffer
	done        chan error
}

func node1(unschedulable bool) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}, Spec: corev1.NodeSpec{Unschedulable: unschedulable}}
}

// startDrain runs the command until it waits for something. Call it in a bubble.
func startDrain(t *testing.T, args string, objects ...client.Object) *drain {
	t.Helper()
	d := &drain{t: t, done: make(chan error, 1)}
	uid := 'A'
	d.c = interceptor.NewClient(newClient(t, objects...), interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if m, ok := o.(*v1alpha1.PodMigration); ok && m.Spec.PodName == "forbidden" {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "podmigrations"}, "", errors.New("not you"))
			}
			o.SetUID(types.UID(uid))
			uid++
			return c.Create(ctx, o, opts...)
		},
		// The fake client does not select what it watches.
		Watch: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) (watch.Interface, error) {
			w, err := c.Watch(ctx, l, opts...)
			if err != nil {
				return nil, err
			}
			by := (&client.ListOptions{}).ApplyOptions(opts)
			events := make(chan watch.Event)
			selected := watch.NewProxyWatcher(events)
			go func() {
				defer w.Stop()
				for {
					select {
					case e := <-w.ResultChan():
						if p, ok := e.Object.(*corev1.Pod); ok && (by.FieldSelector != nil && p.Spec.NodeName != "node1" || !by.LabelSelector.Matches(labels.Set(p.Labels))) {
							continue
						}
						select {
						case events <- e:
						case <-selected.StopChan():
							return
						}
					case <-selected.StopChan():
						return
					}
				}
			}()
			return selected, nil
		},
	})
	go func() { d.done <- d.run(t.Context(), args) }()
	synctest.Wait()
	return d
}

func (d *drain) run(ctx context.Context, args string) error {
	o := &options{config: genericclioptions.NewConfigFlags(true), out: &d.out, errOut: &d.errOut, connect: func() (client.WithWatch, error) { return d.c, nil }}
	cmd := o.command()
	cmd.SetArgs(strings.Fields("--from node1 " + args))
	return cmd.ExecuteContext(ctx)
}

// phase is what the controller says of the migration of a pod.
func (d *drain) phase(pod string, ph v1alpha1.Phase) {
	d.t.Helper()
	m := d.migration(pod)
	if m == nil {
		d.t.Fatalf("pod %s has no migration", pod)
	}
	m.Status.Phase, m.Status.Message, m.Status.SourcePodUID, m.Status.TargetNode = ph, "It is "+string(ph)+".", types.UID(pod), "node2"
	if err := d.c.Status().Update(d.t.Context(), m); err != nil {
		d.t.Fatal(err)
	}
	synctest.Wait()
}

func (d *drain) migration(pod string) *v1alpha1.PodMigration {
	for _, m := range d.migrations() {
		if m.Spec.PodName == pod {
			return &m
		}
	}
	return nil
}

func (d *drain) migrations() []v1alpha1.PodMigration {
	var all v1alpha1.PodMigrationList
	if err := d.c.List(d.t.Context(), &all); err != nil {
		d.t.Fatal(err)
	}
	return all.Items
}

// ordered are the pods with a migration.
func (d *drain) ordered() string {
	var out []string
	for _, m := range d.migrations() {
		out = append(out, m.Spec.PodName)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// end is how the command ends; it must do so without anything more happening.
func (d *drain) end(code int) error {
	d.t.Helper()
	synctest.Wait()
	select {
	case err := <-d.done:
		if ExitCode(err) != code {
			d.t.Errorf("code %d, want %d: %v\n%s%s", ExitCode(err), code, err, &d.errOut, &d.out)
		}
		return err
	default:
		d.t.Fatalf("it goes on:\n%s", &d.errOut)
		return nil
	}
}

func (d *drain) unschedulable() bool {
	var n corev1.Node
	if err := d.c.Get(d.t.Context(), client.ObjectKey{Name: "node1"}, &n); err != nil {
		d.t.Fatal(err)
	}
	return n.Spec.Unschedulable
}

func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is not in\n%s", p, text)
		}
	}
}

func elsewhere(p *corev1.Pod) { p.Spec.NodeName = "node2" }

func TestEmptyNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "--priority 7 --timeout 90s --node-selector disk=ssd", node1(false), pod("redis"), pod("nginx", of("apps/v1", "ReplicaSet")),
			pod("proxy", of("apps/v1", "DaemonSet")), pod("static", mirror), pod("old", phase(corev1.PodSucceeded)), pod("away", elsewhere))
		if !d.unschedulable() {
			t.Error("the node takes pods")
		}
		if got := d.ordered(); got != "nginx redis" {
			t.Errorf("ordered: %s", got)
		}
		if m := d.migration("redis"); m.Namespace != "shop" || m.Spec.Priority != 7 || m.Spec.TimeoutSeconds != 90 || m.Spec.NodeSelector["disk"] != "ssd" {
			t.Errorf("ordered: %+v", m.Spec)
		}
		d.phase("redis", v1alpha1.PhaseFreezing)
		d.phase("redis", v1alpha1.PhaseFreezing)
		d.phase("redis", v1alpha1.PhaseSucceeded)
		d.phase("nginx", v1alpha1.PhaseSucceeded)
		if err := d.end(0); err != nil {
			t.Error(err)
		}
		contains(t, d.errOut.String(), "node/node1 cordoned", "shop/redis                      Freezing      It is Freezing.", "shop/nginx                      Succeeded")
		if strings.Count(d.errOut.String(), "Freezing  ") != 1 {
			t.Errorf("not one line for a phase:\n%s", &d.errOut)
		}
		contains(t, d.out.String(), "POD", "RESULT", "TARGET", "MESSAGE", "shop/redis    Succeeded   node2    It is Succeeded.", "shop/proxy    Ignored", "shop/static   Ignored")
		if strings.Contains(d.out.String(), "old") || strings.Contains(d.out.String(), "away") {
			t.Errorf("pods that do not count:\n%s", &d.out)
		}
	})
}

func TestWorstCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "", node1(true), pod("a"), pod("b"), pod("c"), pod("db", of("apps/v1", "StatefulSet")), pod("forbidden"))
		d.phase("a", v1alpha1.PhaseRefused)
		d.phase("b", v1alpha1.PhaseRolledBack)
		d.phase("c", v1alpha1.PhaseFailed)
		contains(t, d.end(5).Error(), "1 lost, 1 rolled back, 1 refused, 1 not ordered, 1 cannot be moved")
		contains(t, d.out.String(), "StatefulSet owner", "NotOrdered", "not you")
		if strings.Contains(d.errOut.String(), "cordoned") {
			t.Error("it was cordoned before")
		}
	})
}

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		web := budget("web", "web", 0)
		d := startDrain(t, "", node1(false), web, pod("web-1", app("web")), pod("web-2", app("web")), pod("web-3", app("web")), pod("x"))
		if got := d.ordered(); got != "x" {
			t.Fatalf("with none allowed: %s", got)
		}
		contains(t, d.errOut.String(), "Waiting       PodDisruptionBudget web holds it back: it allows 0")
		allow := func(n int32) {
			now := &policyv1.PodDisruptionBudget{}
			if err := d.c.Get(t.Context(), client.ObjectKeyFromObject(web), now); err != nil {
				t.Fatal(err)
			}
			now.Status.DisruptionsAllowed = n
			if err := d.c.Status().Update(t.Context(), now); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		allow(1)
		if got := d.ordered(); got != "web-1 x" {
			t.Fatalf("with one allowed: %s", got)
		}
		d.phase("web-1", v1alpha1.PhaseTransferring)
		if got := d.ordered(); got != "web-1 x" {
			t.Fatalf("with one under way: %s", got)
		}
		d.phase("web-1", v1alpha1.PhaseSucceeded)
		if got := d.ordered(); got != "web-1 web-2 x" {
			t.Fatalf("with one ended: %s", got)
		}
		allow(0)
		d.phase("web-2", v1alpha1.PhaseSucceeded)
		d.phase("x", v1alpha1.PhaseSucceeded)
		// The last one is given up when nothing has moved for the timeout.
		time.Sleep(10*time.Minute - time.Second)
		synctest.Wait()
		select {
		case err := <-d.done:
			t.Fatalf("it ends early: %v", err)
		default:
		}
		time.Sleep(time.Second)
		contains(t, d.end(3).Error(), "3 moved, 1 held back")
		contains(t, d.out.String(), "shop/web-3", "HeldBack", "PodDisruptionBudget web")
	})
}

func TestBudgetOfOtherNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := order("away-1", "away", v1alpha1.PhaseFreezing, "away")
		d := startDrain(t, "", node1(false), budget("web", "web", 1), pod("web-1", app("web")), pod("away", app("web"), elsewhere), other)
		if got := d.ordered(); got != "away" {
			t.Fatalf("beside one of another node: %s", got)
		}
		d.phase("away", v1alpha1.PhaseSucceeded)
		if got := d.ordered(); got != "away web-1" {
			t.Fatalf("when that has ended: %s", got)
		}
		d.phase("web-1", v1alpha1.PhaseSucceeded)
		d.end(0)
	})
}

// The budget's place is free again when the clone is ready.
func TestBudgetWaitsForClones(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "", node1(false), budget("web", "web", 1), pod("web-1", app("web")), pod("web-2", app("web")))
		clone := pod("clone", app("web"), elsewhere, func(p *corev1.Pod) { p.Labels[v1alpha1.LabelMigration] = "x" })
		if err := d.c.Create(t.Context(), clone); err != nil {
			t.Fatal(err)
		}
		m := d.migration("web-1")
		m.Status.ClonePodName = "clone"
		if err := d.c.Status().Update(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		d.phase("web-1", v1alpha1.PhaseSucceeded)
		if got := d.ordered(); got != "web-1" {
			t.Fatalf("with a clone that is not ready: %s", got)
		}
		isReady(clone)
		if err := d.c.Status().Update(t.Context(), clone); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := d.ordered(); got != "web-1 web-2" {
			t.Fatalf("with a clone that is ready: %s", got)
		}
		d.phase("web-2", v1alpha1.PhaseSucceeded)
		d.end(0)
	})
}

// A clone on its way to the node moves on when it has arrived, and not before.
func TestClonesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clone := pod("clone", cloned(corev1.ConditionUnknown), phase(corev1.PodPending))
		d := startDrain(t, "", node1(false), clone)
		if got := d.ordered(); got != "" {
			t.Fatalf("ordered: %s", got)
		}
		clone.Status.Phase, clone.Status.Conditions[0].Status = corev1.PodRunning, corev1.ConditionTrue
		if err := d.c.Status().Update(t.Context(), clone); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := d.ordered(); got != "clone" {
			t.Fatalf("ordered: %s", got)
		}
		d.phase("clone", v1alpha1.PhaseSucceeded)
		d.end(0)
	})
}

// What is deleted meanwhile needs no move, and who deletes a migration of ours has decided.
func TestDeletedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := pod("held", app("web"))
		d := startDrain(t, "", node1(false), budget("web", "web", 0), held, pod("x"))
		if err := d.c.Delete(t.Context(), held); err != nil {
			t.Fatal(err)
		}
		if err := d.c.Delete(t.Context(), d.migration("x")); err != nil {
			t.Fatal(err)
		}
		contains(t, d.end(6).Error(), "1 cancelled")
	})
}

func TestSelection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := pod("b", app("web"))
		other.Namespace = "other"
		d := startDrain(t, "-n shop --selector app=web --no-cordon --to node2 --no-wait", node1(false), pod("a", app("web")), pod("c", app("db")), other)
		d.end(0)
		if got := d.ordered(); got != "a" || d.migration("a").Spec.TargetNode != "node2" {
			t.Errorf("ordered: %s", got)
		}
		if d.unschedulable() {
			t.Error("the node is cordoned")
		}
	})
}

func TestNoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "--no-wait", node1(false), budget("web", "web", 1), pod("web-1", app("web")), pod("web-2", app("web")), pod("x"))
		contains(t, d.end(3).Error(), "2 ordered, 1 held back")
		if got := d.ordered(); got != "web-1 x" {
			t.Errorf("ordered: %s", got)
		}
		if lines := strings.Fields(d.out.String()); len(lines) != 2 || !strings.HasPrefix(lines[0], "podmigration.podmig.dev/web-1-") {
			t.Errorf("it printed %q", lines)
		}
		contains(t, d.errOut.String(), "HeldBack")
	})
}

func TestNodeOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "-o json", node1(false), pod("a"), pod("b"))
		d.phase("a", v1alpha1.PhaseSucceeded)
		d.phase("b", v1alpha1.PhaseSucceeded)
		d.end(0)
		var list v1alpha1.PodMigrationList
		if err := json.Unmarshal(d.out.Bytes(), &list); err != nil || len(list.Items) != 2 || list.Kind != "PodMigrationList" || list.Items[0].Kind != "PodMigration" {
			t.Errorf("%v:\n%s", err, &d.out)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "-o wide", node1(false), pod("a"))
		d.phase("a", v1alpha1.PhaseSucceeded)
		d.end(0)
		contains(t, d.out.String(), "SOURCE", "CLONE", "MIGRATION", "TOOK", "REASON")
	})
}

func TestCancelNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := order("away-1", "away", v1alpha1.PhaseFreezing, "away")
		d := startDrain(t, "--cancel", node1(true), pod("a"), pod("b"), pod("away", elsewhere), away, order("a-1", "a", v1alpha1.PhaseFreezing, "a"),
			order("b-1", "b", "", ""), order("b-0", "b", v1alpha1.PhaseSucceeded, "b"))
		// client-go looks every 100 ms whether it has listed.
		time.Sleep(time.Second)
		d.end(0)
		contains(t, d.out.String(), "a-1 cancelled", "b-1 cancelled")
		if got := d.ordered(); got != "away b" {
			t.Errorf("left: %s", got)
		}
		contains(t, d.run(t.Context(), "--cancel").Error(), "no migration of a pod of node node1")
	})
}

func TestInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "--no-wait", node1(false))
		d.end(0)
		for _, p := range []*corev1.Pod{pod("a"), pod("b", app("web"))} {
			if err := d.c.Create(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.c.Create(t.Context(), budget("web", "web", 0)); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		go func() { d.done <- d.run(ctx, "") }()
		synctest.Wait()
		stop()
		contains(t, d.end(1).Error(), "1 migrations go on and 1 pods are not ordered; kubectl migrate --from node1 --cancel")
	})
}

func TestNoSuchNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startDrain(t, "")
		contains(t, d.end(1).Error(), "there is no node node1")
	})
}

// Nothing is changed if not all can be read that is needed.
func TestRights(t *testing.T) {
	d := &drain{t: t}
	d.c = interceptor.NewClient(newClient(t, node1(false), pod("a")), interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
			if _, ok := l.(*policyv1.PodDisruptionBudgetList); ok {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "poddisruptionbudgets"}, "", errors.New("not you"))
			}
			return c.List(ctx, l, opts...)
		},
	})
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	contains(t, d.run(ctx, "").Error(), "list disruption budgets", "not you")
	if d.unschedulable() || d.ordered() != "" {
		t.Error("something was changed")
	}
}
