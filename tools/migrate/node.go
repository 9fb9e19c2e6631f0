package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// node is one that is emptied.
type node struct {
	*options
	c         client.WithWatch
	seen      *observed
	selector  labels.Selector
	began     time.Time
	phases    map[types.UID]v1alpha1.Phase
	saidWaits map[types.UID]bool
}

func (o *options) node(c client.WithWatch) (*node, error) {
	selector, err := labels.Parse(o.pods)
	if err != nil {
		return nil, fmt.Errorf("--selector is %q: %w", o.pods, err)
	}
	return &node{
		options: o, c: c, seen: newObserved(), selector: selector, began: time.Now(),
		phases: map[types.UID]v1alpha1.Phase{}, saidWaits: map[types.UID]bool{},
	}, nil
}

// empty moves all pods of the node that can be moved and says what has become of them.
func (n *node) empty(ctx context.Context) error {
	if err := n.allowed(ctx); err != nil {
		return err
	}
	if err := n.cordon(ctx); err != nil {
		return err
	}
	rows, err := n.move(ctx)
	if err != nil && ctx.Err() != nil {
		c := count(n.seen.rows())
		return fmt.Errorf("not followed any more: %d migrations go on and %d pods are not ordered; kubectl migrate --from %s --cancel cancels them", c[moving], c[ready]+c[waiting], n.from)
	}
	if err != nil {
		return err
	}
	return errors.Join(n.printRows(rows), verdict(n.from, rows))
}

// allowed finds out whether all can be read that is watched later, before anything is
// changed: a watch would just try again.
func (n *node) allowed(ctx context.Context) error {
	for what, list := range map[string]client.ObjectList{
		"pods": &corev1.PodList{}, "disruption budgets": &policyv1.PodDisruptionBudgetList{}, "migrations": &v1alpha1.PodMigrationList{},
	} {
		if err := n.c.List(ctx, list, client.InNamespace(n.scope), client.Limit(1)); err != nil {
			return fmt.Errorf("list %s: %w", what, explain(err))
		}
	}
	return nil
}

// cordon keeps other pods from the node.
func (n *node) cordon(ctx context.Context) error {
	var x corev1.Node
	err := n.c.Get(ctx, client.ObjectKey{Name: n.from}, &x)
	switch {
	case n.noCordon && apierrors.IsForbidden(err):
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("there is no node %s: kubectl get nodes lists them", n.from)
	case err != nil:
		return fmt.Errorf("read node %s: %w", n.from, err)
	case n.noCordon || x.Spec.Unschedulable:
		return nil
	}
	before := x.DeepCopy()
	x.Spec.Unschedulable = true
	if err := n.c.Patch(ctx, &x, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("cordon node %s (or use --no-cordon): %w", n.from, err)
	}
	fmt.Fprintf(n.errOut, "node/%s cordoned\n", n.from)
	return nil
}

// mine selects the pods that are asked for.
func (n *node) mine() []client.ListOption {
	return []client.ListOption{
		client.InNamespace(n.scope), client.MatchingLabelsSelector{Selector: n.selector},
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("spec.nodeName", n.from)},
	}
}

// move orders migrations as budgets allow, until nothing is left to wait for.
func (n *node) move(ctx context.Context) ([]row, error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	events := make(chan func())
	pods, err := observe(ctx, n.c, &corev1.PodList{}, &corev1.Pod{}, events, n.seen.seePod, n.mine()...)
	if err != nil {
		return nil, err
	}
	migrations, err := observe(ctx, n.c, &v1alpha1.PodMigrationList{}, &v1alpha1.PodMigration{}, events, func(m *v1alpha1.PodMigration, gone bool) {
		n.seen.seeMigration(m, gone)
		n.tell(m.UID)
	}, client.InNamespace(n.scope))
	if err != nil {
		return nil, err
	}
	clones, err := observe(ctx, n.c, &corev1.PodList{}, &corev1.Pod{}, events, n.seen.seeClone, client.InNamespace(n.scope), client.HasLabels{v1alpha1.LabelMigration})
	if err != nil {
		return nil, err
	}
	budgets, err := observe(ctx, n.c, &policyv1.PodDisruptionBudgetList{}, &policyv1.PodDisruptionBudget{}, events, n.seen.seeBudget, client.InNamespace(n.scope))
	if err != nil {
		return nil, err
	}

	synced := make(chan struct{})
	go func() {
		if toolscache.WaitFor(ctx, "", pods, migrations, clones, budgets) {
			close(synced)
		}
	}()
	for waiting := true; waiting; {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case see := <-events:
			see()
		case <-synced:
			waiting = false
		}
	}

	// patience ends when nothing of ours has been under way for the timeout.
	var patience <-chan time.Time
	for late := false; ; {
		if err := n.learn(ctx); err != nil {
			return nil, err
		}
		rows := n.seen.rows()
		switch c := count(rows); {
		case c[ready] > 0:
			if err := n.start(ctx, rows); err != nil {
				return nil, err
			}
			continue
		case n.noWait, late, c[moving]+c[waiting] == 0:
			return rows, nil
		case c[moving] > 0:
			patience = nil
		case patience == nil:
			patience = time.After(n.timeout)
		}
		n.tellWaits(rows)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case see := <-events:
			see()
		case <-patience:
			late = true
		}
	}
}

// observe tells of all objects of a list and their changes.
func observe[T client.Object](ctx context.Context, c client.WithWatch, list client.ObjectList, kind T, events chan<- func(), see func(o T, gone bool), opts ...client.ListOption) (toolscache.DoneChecker, error) {
	send := func(o any, gone bool) {
		if last, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
			o = last.Obj
		}
		select {
		case events <- func() { see(o.(T), gone) }:
		case <-ctx.Done():
		}
	}
	informer := toolscache.NewSharedIndexInformer(listWatch(c, list, opts...), kind, 0, nil)
	// A watch that ends because we do is no error.
	err := informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *toolscache.Reflector, err error) {
		if ctx.Err() == nil {
			toolscache.DefaultWatchErrorHandler(ctx, r, err)
		}
	})
	if err != nil {
		return nil, err
	}
	told, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { send(o, false) },
		UpdateFunc: func(_, o any) { send(o, false) },
		DeleteFunc: func(o any) { send(o, true) },
	})
	if err != nil {
		return nil, err
	}
	go informer.RunWithContext(ctx)
	return told.HasSyncedChecker(), nil
}

// learn reads the labels of pods on other nodes that move: they may use up budgets of ours.
func (n *node) learn(ctx context.Context) error {
	for _, m := range n.seen.unknown() {
		p := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}}
		err := n.c.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.PodName}, p)
		switch {
		case apierrors.IsNotFound(err):
			n.seen.elsewhere[m.UID] = nil
		case err != nil:
			return fmt.Errorf("read pod %s/%s, which moves: %w", m.Namespace, m.Spec.PodName, err)
		default:
			n.seen.elsewhere[m.UID] = labels.Merge(p.Labels, nil)
		}
	}
	return nil
}

// start orders the migrations of the pods that are ready. One that the API server does not
// take keeps no other from moving.
func (n *node) start(ctx context.Context, rows []row) error {
	for _, r := range rows {
		if r.standing != ready {
			continue
		}
		m := n.migration(r.pod.Namespace, r.pod.Name)
		if err := n.c.Create(ctx, m); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			n.seen.rejected[r.pod.UID] = fmt.Sprintf("The API server took no migration: %s.", explain(err))
			continue
		}
		n.seen.order(r.pod, m)
	}
	return nil
}

// tell says that a pod of the node is in another phase.
func (n *node) tell(id types.UID) {
	m := n.seen.migrations[id]
	p := n.seen.podOf(m)
	last, told := n.phases[id]
	if m.Status.Phase == "" || m.Status.Phase == last || p == nil || !told && m.Status.Phase.Over() && n.seen.ordered[p.UID] != id {
		return
	}
	n.phases[id] = m.Status.Phase
	n.say(p, string(m.Status.Phase), m.Status.Message)
}

// tellWaits says once of each pod that it waits, and what for.
func (n *node) tellWaits(rows []row) {
	for _, r := range rows {
		if r.standing == waiting && !n.saidWaits[r.pod.UID] {
			n.saidWaits[r.pod.UID] = true
			n.say(r.pod, "Waiting", r.why)
		}
	}
}

func (n *node) say(p *corev1.Pod, phase, message string) {
	fmt.Fprintf(n.errOut, "%6.1fs  %-30s  %-12s  %s\n", time.Since(n.began).Seconds(), p.Namespace+"/"+p.Name, phase, message)
}

// cancelAll cancels the migrations of all pods of the node.
func (n *node) cancelAll(ctx context.Context) error {
	var pods corev1.PodList
	if err := n.c.List(ctx, &pods, n.mine()...); err != nil {
		return fmt.Errorf("list the pods of node %s: %w", n.from, err)
	}
	here := map[types.NamespacedName]*corev1.Pod{}
	for i := range pods.Items {
		here[client.ObjectKeyFromObject(&pods.Items[i])] = &pods.Items[i]
	}
	found, err := n.cancelWhere(ctx, n.c, n.scope, func(m *v1alpha1.PodMigration) bool {
		p := here[client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.PodName}]
		return p != nil && moves(m, p)
	})
	if err == nil && found == 0 {
		return fmt.Errorf("no migration of a pod of node %s runs or waits", n.from)
	}
	return err
}
