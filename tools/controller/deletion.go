package controller

import (
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// Deletions moves the pods whose deletion waits (package deferral), and takes the finalizer
// from those that have no reason to wait.
type Deletions struct {
	client.Client
	// Live reads what decisions depend on that cannot be taken back.
	Live     client.Reader
	Recorder events.EventRecorder
	Now      func() time.Time
}

const (
	// maxAttempts is how often it is tried to move a pod that is being deleted.
	maxAttempts = 6
	// firstBackoff is how long it waits after the first failure; each time twice as long.
	firstBackoff = 2 * time.Second
	// historySeconds is how long the migrations that it makes are kept.
	historySeconds = 3600
)

// Reasons of events on pods.
const (
	eventMoving    = "MigratingOnDeletion"
	eventGivenUp   = "MigrationGivenUp"
	eventImmovable = "CannotMigrate"
)

// SetupWithManager lets a manager call the reconciler.
func (r *Deletions) SetupWithManager(mgr ctrl.Manager) error {
	waiting := predicate.NewPredicateFuncs(func(o client.Object) bool {
		return o.GetDeletionTimestamp() != nil && controllerutil.ContainsFinalizer(o, v1alpha1.FinalizerMigrate)
	})
	return ctrl.NewControllerManagedBy(mgr).Named("deletion").
		For(&corev1.Pod{}, builder.WithPredicates(waiting)).
		Watches(&v1alpha1.PodMigration{}, handler.EnqueueRequestsFromMapFunc(movedBy)).
		Complete(r)
}

// movedBy is the pod that a migration moves, whoever has ordered it: if it fails, it is our
// turn.
func movedBy(_ context.Context, o client.Object) []ctrl.Request {
	m, ok := o.(*v1alpha1.PodMigration)
	if !ok {
		return nil
	}
	return []ctrl.Request{{NamespacedName: client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.PodName}}}
}

// Reconcile looks at one pod.
func (r *Deletions) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	p := &corev1.Pod{}
	if err := r.Live.Get(ctx, req.NamespacedName, p); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if p.DeletionTimestamp == nil || !deferral.HasFinalizer(p) {
		return ctrl.Result{}, nil
	}
	now := r.Now()
	if deferral.Ended(p) || !deferral.Waits(p, now) {
		// It has moved or ended, or its kubelet ends it and says why.
		return ctrl.Result{}, r.release(ctx, p, "", "")
	}
	why, reason, err := r.unwanted(ctx, p)
	if err != nil {
		return ctrl.Result{}, err
	}
	if reason != "" {
		return ctrl.Result{}, r.release(ctx, p, reason, why)
	}
	// No event of the pod tells that its owner or its node is gone.
	left := min(deferral.Deadline(p).Sub(now), lookAgain)
	if arriving(p) {
		// It moves already, as somebody's clone. The end of that is an event.
		return ctrl.Result{RequeueAfter: left}, nil
	}
	if p.Status.Phase != corev1.PodRunning {
		return ctrl.Result{}, r.release(ctx, p, eventGivenUp, "The pod does not run yet, so there is nothing to move.")
	}
	var all v1alpha1.PodMigrationList
	if err := r.Live.List(ctx, &all, client.InNamespace(p.Namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("list migrations: %w", err)
	}
	wait, again, why := next(p, all.Items, now)
	switch {
	case why != "":
		return ctrl.Result{}, r.release(ctx, p, eventGivenUp, why)
	case wait > 0:
		return ctrl.Result{RequeueAfter: min(wait, left)}, nil
	case again < 0:
		return ctrl.Result{RequeueAfter: left}, nil
	}
	err = r.move(ctx, p, again, deferral.Deadline(p).Sub(now))
	if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return ctrl.Result{}, r.release(ctx, p, eventGivenUp, "The namespace is being deleted, and its pods with it.")
	}
	return ctrl.Result{RequeueAfter: left}, err
}

// unwanted tells why a pod should not wait: an event's reason and sentence.
func (r *Deletions) unwanted(ctx context.Context, p *corev1.Pod) (why, reason string, err error) {
	owner := metav1.GetControllerOf(p)
	kind := kindOf(owner)
	if kind == stranger {
		return immovable(p.Name, owner) + " It is deleted as if it had no finalizer.", eventImmovable, nil
	}
	if kind == nobody {
		return "", "", nil
	}
	gone, err := ownerGone(ctx, r.Live, p.Namespace, owner)
	if err != nil {
		return "", "", err
	}
	if gone {
		return fmt.Sprintf("%s %s is deleted, and its pods with it.", owner.Kind, owner.Name), eventGivenUp, nil
	}
	if kind != set {
		return "", "", nil
	}
	// A set would have replaced a pod of a node that is lost, and must not wait for it.
	node := &corev1.Node{}
	if err := r.Live.Get(ctx, client.ObjectKey{Name: p.Spec.NodeName}, node); client.IgnoreNotFound(err) != nil {
		return "", "", fmt.Errorf("read node %s: %w", p.Spec.NodeName, err)
	} else if err != nil || lost(node) {
		return fmt.Sprintf("Node %s does not answer, so the pod cannot be moved; %s %s replaces it.", p.Spec.NodeName, owner.Kind, owner.Name), eventGivenUp, nil
	}
	return "", "", nil
}

// lost tells whether nothing is heard of a node.
func lost(node *corev1.Node) bool {
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown
	})
}

// next decides about a pod that waits, from all migrations of its namespace: how long to
// wait, or with which number to try (negative: something is under way), or why to give up.
func next(p *corev1.Pod, all []v1alpha1.PodMigration, now time.Time) (wait time.Duration, number int, why string) {
	failures := 0
	var last *v1alpha1.PodMigration
	for i := range all {
		m := &all[i]
		if m.Spec.PodName != p.Name || m.Status.SourcePodUID != "" && m.Status.SourcePodUID != p.UID {
			continue
		}
		if !m.Status.Phase.Over() || m.Status.Phase == v1alpha1.PhaseSucceeded && !m.Spec.DryRun {
			// Also one that somebody else has ordered.
			return 0, -1, ""
		}
		if m.Labels[v1alpha1.LabelSourceUID] != string(p.UID) {
			continue
		}
		failures++
		// Those before it may have been deleted meanwhile.
		n, _ := strconv.Atoi(m.Name[strings.LastIndexByte(m.Name, '-')+1:])
		number = max(number, n+1)
		if last == nil || ended(m).After(ended(last)) {
			last = m
		}
	}
	if failures >= maxAttempts {
		return 0, 0, fmt.Sprintf("The pod could not be moved in %d attempts, the last one: %s It is deleted without.", failures, last.Status.Message)
	}
	if last == nil {
		return 0, 0, ""
	}
	return max(0, ended(last).Add(firstBackoff<<(failures-1)).Sub(now)), number, ""
}

// move orders a migration.
func (r *Deletions) move(ctx context.Context, p *corev1.Pod, number int, left time.Duration) error {
	h := fnv.New64a()
	h.Write([]byte(p.UID))
	history := int32(historySeconds)
	m := &v1alpha1.PodMigration{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace,
			Name:      fmt.Sprintf("%s-%s-%d", cut(p.Name, 230), strconv.FormatUint(h.Sum64(), 36)[:6], number),
			Labels:    map[string]string{v1alpha1.LabelSourceUID: string(p.UID)},
		},
		Spec: v1alpha1.PodMigrationSpec{
			PodName: p.Name, TimeoutSeconds: int32(max(1, min(left.Seconds(), 86400))), TTLSecondsAfterFinished: &history,
		},
	}
	if owner := metav1.GetControllerOf(p); kindOf(owner) == migratingPod {
		mp := &v1alpha1.MigratingPod{}
		if err := r.Live.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: owner.Name}, mp); err != nil {
			return fmt.Errorf("read MigratingPod %s: %w", owner.Name, err)
		}
		m.Spec.NodeSelector, m.Spec.Priority = mp.Spec.NodeSelector, mp.Spec.Strategy.Priority
		// Its history goes with it.
		m.OwnerReferences = []metav1.OwnerReference{{APIVersion: owner.APIVersion, Kind: owner.Kind, Name: owner.Name, UID: owner.UID}}
	}
	err := r.Create(ctx, m)
	switch {
	case apierrors.IsAlreadyExists(err):
		return nil
	case err != nil:
		return fmt.Errorf("order a migration: %w", err)
	}
	log.FromContext(ctx).Info("Moving a pod that is being deleted", "migration", m.Name, "attempt", number+1, "uid", p.UID)
	r.Recorder.Eventf(p, m, corev1.EventTypeNormal, eventMoving, "Migrate", "The pod is being deleted and moves first: PodMigration %s, attempt %d of at most %d.", m.Name, number+1, maxAttempts)
	return nil
}

// release takes the finalizer from a pod, so that the deletion goes on.
func (r *Deletions) release(ctx context.Context, p *corev1.Pod, reason, message string) error {
	i := slices.Index(p.Finalizers, v1alpha1.FinalizerMigrate)
	patch := fmt.Appendf(nil, `[{"op":"test","path":"/metadata/uid","value":%q},{"op":"test","path":"/metadata/finalizers/%d","value":%q},{"op":"remove","path":"/metadata/finalizers/%d"}]`,
		p.UID, i, v1alpha1.FinalizerMigrate, i)
	err := r.Patch(ctx, p, client.RawPatch(types.JSONPatchType, patch))
	if err != nil {
		if apierrors.IsInvalid(err) {
			// Somebody has changed the list meanwhile; that is an event of its own.
			return nil
		}
		return client.IgnoreNotFound(err)
	}
	log.FromContext(ctx).Info("The deletion of a pod waits no longer", "reason", reason, "message", message, "uid", p.UID)
	if reason != "" {
		r.Recorder.Eventf(p, nil, corev1.EventTypeWarning, reason, "Migrate", "%s", message)
	}
	return nil
}
