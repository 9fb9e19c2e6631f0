package controller

import (
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
	"podmig.dev/podmig/tools/clone"
)

// Migrations reconciles PodMigration objects.
type Migrations struct {
	// Client writes, and reads migrations from the cache.
	client.Client
	// Live reads what decisions depend on that cannot be taken back.
	Live     client.Reader
	Recorder events.EventRecorder
	Limits   Limits
	// Now is the time, for deadlines.
	Now func() time.Time
}

// SetupWithManager lets a manager call the reconciler, one object at a time.
func (r *Migrations) SetupWithManager(mgr ctrl.Manager) error {
	clones := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []ctrl.Request {
		name := o.GetAnnotations()[annotationMigration]
		if o.GetLabels()[v1alpha1.LabelMigration] == "" || name == "" {
			return nil
		}
		return []ctrl.Request{{NamespacedName: client.ObjectKey{Namespace: o.GetNamespace(), Name: name}}}
	})
	// One that ends makes room for those that wait.
	waiting := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []ctrl.Request {
		if m, ok := o.(*v1alpha1.PodMigration); ok && !m.Status.Phase.Over() && m.DeletionTimestamp.IsZero() {
			return nil
		}
		var all v1alpha1.PodMigrationList
		if err := r.List(ctx, &all); err != nil {
			log.FromContext(ctx).Error(err, "Waiting migrations cannot be listed")
			return nil
		}
		var out []ctrl.Request
		for i := range all.Items {
			if m := &all.Items[i]; !begun(m) && !m.Status.Phase.Over() {
				out = append(out, ctrl.Request{NamespacedName: client.ObjectKeyFromObject(m)})
			}
		}
		return out
	})
	// A source that was given away says so when its kubelet is done with it.
	sources := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []ctrl.Request {
		if p, ok := o.(*corev1.Pod); !ok || p.Status.Reason != v1alpha1.ReasonMigrated || metav1.GetControllerOf(p) == nil {
			return nil
		}
		var all v1alpha1.PodMigrationList
		if err := r.List(ctx, &all, client.InNamespace(o.GetNamespace())); err != nil {
			log.FromContext(ctx).Error(err, "Migrations cannot be listed")
			return nil
		}
		var out []ctrl.Request
		for i := range all.Items {
			if m := &all.Items[i]; m.Status.SourcePodUID == o.GetUID() && m.Status.Phase == v1alpha1.PhaseSucceeded {
				out = append(out, ctrl.Request{NamespacedName: client.ObjectKeyFromObject(m)})
			}
		}
		return out
	})
	return ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.PodMigration{}).
		Watches(&corev1.Pod{}, clones).
		Watches(&corev1.Pod{}, sources).
		Watches(&v1alpha1.PodMigration{}, waiting).
		Complete(r)
}

// annotationMigration is on clones, with the name of their migration.
const annotationMigration = "podmig.dev/migration-name"

// Reconcile brings one migration a step further.
func (r *Migrations) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	m := &v1alpha1.PodMigration{}
	// Live: a status from before the last step would take it twice.
	if err := r.Live.Get(ctx, req.NamespacedName, m); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if m.Status.Phase.Over() {
		return r.settle(ctx, m)
	}
	if m.DeletionTimestamp.IsZero() && controllerutil.AddFinalizer(m, v1alpha1.FinalizerCancel) {
		return ctrl.Result{}, r.Update(ctx, m)
	}
	before := m.DeepCopy()
	wait, err := r.step(ctx, m)
	if err != nil {
		return ctrl.Result{}, err
	}
	if m.Status.Phase != before.Status.Phase {
		m.Status.PhaseTransitions = append(m.Status.PhaseTransitions, v1alpha1.PhaseTransition{Phase: m.Status.Phase, Time: metav1.NewMicroTime(r.Now())})
		log.FromContext(ctx).Info("Migration goes on", "phase", m.Status.Phase, "reason", m.Status.Reason, "pod", m.Spec.PodName, "clone", m.Status.ClonePodName)
	}
	if begun(m) && (wait == 0 || wait > lookAgain) {
		wait = lookAgain
	}
	if equality.Semantic.DeepEqual(m.Status, before.Status) {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	if err := r.Status().Patch(ctx, m, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if m.Status.Phase.Over() {
		r.tell(m)
		return r.settle(ctx, m)
	}
	return ctrl.Result{RequeueAfter: wait}, nil
}

// lookAgain is how often a migration that runs, and a pod that waits, is looked at although nothing
// was heard of it: after the API server was away, watches come back up to a minute late.
const lookAgain = 10 * time.Second

// step looks at a migration and changes its status. The duration is when to look again
// although nothing happens.
func (r *Migrations) step(ctx context.Context, m *v1alpha1.PodMigration) (time.Duration, error) {
	if m.Status.ClonePodName == "" {
		return 0, r.begin(ctx, m)
	}
	p := &corev1.Pod{}
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: m.Status.ClonePodName}, p)
	switch {
	case apierrors.IsNotFound(err):
		return 0, r.missing(ctx, m)
	case err != nil:
		return 0, fmt.Errorf("read the clone: %w", err)
	case p.Labels[v1alpha1.LabelMigration] != string(m.UID):
		end(m, v1alpha1.PhaseRefused, v1alpha1.MigrationCloneRefused, fmt.Sprintf("There is a pod %q that is not of this migration; delete it and make another migration.", p.Name))
		return 0, nil
	}
	m.Status.ClonePodUID, m.Status.TargetNode = p.UID, p.Spec.NodeName
	return r.follow(ctx, m, p)
}

// begin decides whether a migration may begin, and gives it a clone's name if so: the
// clone is created when that is written.
func (r *Migrations) begin(ctx context.Context, m *v1alpha1.PodMigration) error {
	if !m.DeletionTimestamp.IsZero() {
		end(m, v1alpha1.PhaseCancelled, v1alpha1.ReasonCancelled, "The migration was deleted before it began.")
		return nil
	}
	source, err := r.source(ctx, m)
	if err != nil {
		return err
	}
	if why := r.unfit(source, m); why != "" {
		end(m, v1alpha1.PhaseRefused, v1alpha1.MigrationUnfitPod, why)
		return nil
	}
	node, _, _ := unstructured.NestedString(source.Object, "spec", "nodeName")
	m.Status.Phase, m.Status.SourcePodUID, m.Status.SourceNode = v1alpha1.PhasePending, source.GetUID(), node
	var all v1alpha1.PodMigrationList
	if err := r.Live.List(ctx, &all); err != nil {
		return fmt.Errorf("list all migrations: %w", err)
	}
	for i := range all.Items {
		if all.Items[i].UID == m.UID {
			all.Items[i] = *m
		}
	}
	if !admissible(all.Items, r.Limits)[m.UID] {
		m.Status.Reason, m.Status.Message = v1alpha1.MigrationQueued, "It waits until other migrations of this pod, of its nodes or of the cluster have ended."
		return nil
	}
	m.Status.Phase, m.Status.Reason, m.Status.Message = v1alpha1.PhaseScheduling, "", ""
	m.Status.ClonePodName, err = r.cloneName(ctx, source, m)
	return err
}

// source reads the pod that moves, nil if there is none. It is not decoded, so that
// fields which this program does not know are carried over to the clone.
func (r *Migrations) source(ctx context.Context, m *v1alpha1.PodMigration) (*unstructured.Unstructured, error) {
	u := &unstructured.Unstructured{}
	u.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Pod"))
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.PodName}, u)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read pod %s: %w", m.Spec.PodName, err)
	case m.Status.SourcePodUID != "" && m.Status.SourcePodUID != u.GetUID():
		return nil, nil
	}
	return u, nil
}

func phaseOf(pod *unstructured.Unstructured) string {
	phase, _, _ := unstructured.NestedString(pod.Object, "status", "phase")
	return phase
}

// unfit says why a pod cannot be moved, as far as that is seen without its node.
func (r *Migrations) unfit(source *unstructured.Unstructured, m *v1alpha1.PodMigration) string {
	if source == nil {
		return fmt.Sprintf("There is no pod %q in namespace %q; name a running pod.", m.Spec.PodName, m.Namespace)
	}
	if source.GetDeletionTimestamp() != nil && !deferral.Waits(meta(source), r.Now()) {
		return fmt.Sprintf("Pod %q is being deleted.", m.Spec.PodName)
	}
	if phase := phaseOf(source); phase != string(corev1.PodRunning) {
		return fmt.Sprintf("Pod %q is %s; only a running pod can be moved.", m.Spec.PodName, phase)
	}
	if node, _, _ := unstructured.NestedString(source.Object, "spec", "nodeName"); node == m.Spec.TargetNode {
		return fmt.Sprintf("Pod %q is on node %s already; name another node, or none.", m.Spec.PodName, node)
	}
	return immovable(m.Spec.PodName, metav1.GetControllerOf(source))
}

// meta has the metadata of a pod that is not decoded, and nothing else.
func meta(pod *unstructured.Unstructured) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: pod.GetName(), Annotations: pod.GetAnnotations(), Finalizers: pod.GetFinalizers(),
		DeletionTimestamp: pod.GetDeletionTimestamp(), DeletionGracePeriodSeconds: pod.GetDeletionGracePeriodSeconds(),
	}}
}

// cloneName is a name that no pod has.
func (r *Migrations) cloneName(ctx context.Context, source *unstructured.Unstructured, m *v1alpha1.PodMigration) (string, error) {
	if owner := metav1.GetControllerOf(source); kindOf(owner) == migratingPod {
		var all corev1.PodList
		if err := r.Live.List(ctx, &all, client.InNamespace(m.Namespace)); err != nil {
			return "", fmt.Errorf("list the pods of namespace %s: %w", m.Namespace, err)
		}
		// Also pods of others may have such names.
		var names []string
		for i := range all.Items {
			names = append(names, all.Items[i].Name)
		}
		return nextName(owner.Name, names...), nil
	}
	h := fnv.New64a()
	h.Write([]byte(m.UID))
	return fmt.Sprintf("%s-%s", cut(originOf(source), 240), strconv.FormatUint(h.Sum64(), 36)[:6]), nil
}

func originOf(source *unstructured.Unstructured) string {
	if origin := source.GetAnnotations()[v1alpha1.AnnotationOrigin]; origin != "" {
		return origin
	}
	return source.GetName()
}

// missing creates the clone, or finds out why it is gone.
func (r *Migrations) missing(ctx context.Context, m *v1alpha1.PodMigration) error {
	source, err := r.source(ctx, m)
	if err != nil {
		return err
	}
	switch {
	case m.Status.ClonePodUID != "":
		r.gone(m, source)
	case !m.DeletionTimestamp.IsZero():
		end(m, v1alpha1.PhaseCancelled, v1alpha1.ReasonCancelled, "The migration was deleted before its clone existed.")
	default:
		if why := r.unfit(source, m); why != "" {
			end(m, v1alpha1.PhaseRefused, v1alpha1.MigrationUnfitPod, why)
			return nil
		}
		return r.create(ctx, m, source)
	}
	return nil
}

// gone ends a migration whose clone somebody has deleted.
func (r *Migrations) gone(m *v1alpha1.PodMigration, source *unstructured.Unstructured) {
	phase, reason := v1alpha1.PhaseCancelled, v1alpha1.MigrationCloneGone
	switch {
	case m.Status.Reason == v1alpha1.MigrationTimedOut:
		// It was deleted here, because no node took it.
		phase, reason = v1alpha1.PhaseRefused, m.Status.Reason
	case !m.DeletionTimestamp.IsZero():
		// Here, too, or by somebody else at the same time.
		reason = v1alpha1.ReasonCancelled
	}
	migrated := false
	if source != nil {
		why, _, _ := unstructured.NestedString(source.Object, "status", "reason")
		migrated = why == v1alpha1.ReasonMigrated
	}
	switch {
	case migrated:
		end(m, v1alpha1.PhaseSucceeded, v1alpha1.ReasonCloned, fmt.Sprintf("The pod was taken over by pod %s, which has been deleted since.", m.Status.ClonePodName))
	case source != nil && phaseOf(source) == string(corev1.PodRunning) && mayBeGivenAway(m) && r.Now().Sub(ended(m)) < goneGrace:
		// Its kubelet will say what became of it.
	case source != nil && phaseOf(source) == string(corev1.PodRunning):
		message := fmt.Sprintf("The clone is gone; pod %s runs on on node %s.", m.Spec.PodName, m.Status.SourceNode)
		if phase == v1alpha1.PhaseRefused {
			message = m.Status.Message
		}
		end(m, phase, reason, message)
	default:
		end(m, v1alpha1.PhaseFailed, reason, "Both pods are gone.")
	}
}

// goneGrace is how long the kubelet of a source may take to say that it was given away, after the last
// that was seen of its clone.
const goneGrace = 20 * time.Second

// mayBeGivenAway tells whether the source may have ended without the API server knowing it yet.
func mayBeGivenAway(m *v1alpha1.PodMigration) bool {
	return m.Status.Phase == v1alpha1.PhaseFreezing || m.Status.Phase == v1alpha1.PhaseRestoring
}

func (r *Migrations) create(ctx context.Context, m *v1alpha1.PodMigration, source *unstructured.Unstructured) error {
	origin := originOf(source)
	c, err := clone.Of(source, clone.Options{Name: m.Status.ClonePodName, Node: m.Spec.TargetNode})
	if err != nil {
		end(m, v1alpha1.PhaseRefused, v1alpha1.MigrationUnfitPod, err.Error())
		return nil
	}
	labels := maps.Clone(c.GetLabels())
	if labels == nil {
		labels = map[string]string{}
	}
	labels[v1alpha1.LabelMigration] = string(m.UID)
	c.SetLabels(labels)
	annotations := maps.Clone(c.GetAnnotations())
	if annotations == nil {
		annotations = map[string]string{}
	}
	delete(annotations, v1alpha1.AnnotationCancel)
	annotations[v1alpha1.AnnotationOrigin], annotations[annotationMigration] = origin, m.Name
	annotations[v1alpha1.AnnotationSource] = source.GetName()
	delete(annotations, v1alpha1.AnnotationFreezeBudget)
	if b := m.Spec.FreezeBudgetMilliseconds; b != nil {
		annotations[v1alpha1.AnnotationFreezeBudget] = strconv.Itoa(int(*b))
	}
	delete(annotations, v1alpha1.AnnotationDryRun)
	if m.Spec.DryRun {
		annotations[v1alpha1.AnnotationDryRun] = "true"
	}
	c.SetAnnotations(annotations)
	// Whoever owns the source owns the clone from the start: it would stay behind if the
	// owner were deleted meanwhile.
	c.SetOwnerReferences(source.GetOwnerReferences())
	if slices.Contains(source.GetFinalizers(), v1alpha1.FinalizerMigrate) {
		c.SetFinalizers([]string{v1alpha1.FinalizerMigrate})
	}
	for key, value := range m.Spec.NodeSelector {
		if err := unstructured.SetNestedField(c.Object, value, "spec", "nodeSelector", key); err != nil {
			return fmt.Errorf("node selector of the clone: %w", err)
		}
	}
	// An API server with the feature gate off drops the field, and what it created would
	// start like any other pod, beside the first.
	trial := c.DeepCopy()
	if err = r.Create(ctx, trial, client.DryRunAll); err == nil {
		if name, _, _ := unstructured.NestedString(trial.Object, "spec", "clonePod"); name != source.GetName() {
			end(m, v1alpha1.PhaseRefused, v1alpha1.ReasonMigrationDisabled, "The API server drops spec.clonePod; switch on the feature gate PodMigration there.")
			return nil
		}
		err = r.Create(ctx, c)
	}
	switch {
	case apierrors.IsForbidden(err), apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		end(m, v1alpha1.PhaseRefused, v1alpha1.MigrationCloneRefused, fmt.Sprintf("The API server refuses the clone: %s.", err))
		return nil
	case err != nil && !apierrors.IsAlreadyExists(err):
		return fmt.Errorf("create the clone: %w", err)
	}
	m.Status.ClonePodUID = c.GetUID()
	return nil
}

// follow reads from the clone how far it is.
func (r *Migrations) follow(ctx context.Context, m *v1alpha1.PodMigration, p *corev1.Pod) (time.Duration, error) {
	cloned := condition(p, v1alpha1.ConditionCloned)
	measure(m, condition(p, v1alpha1.ConditionTransfer))
	switch {
	case cloned != nil && cloned.Status == corev1.ConditionTrue:
		end(m, v1alpha1.PhaseSucceeded, cloned.Reason, fmt.Sprintf("Pod %s on node %s has taken over.", p.Name, p.Spec.NodeName))
		return 0, nil
	case cloned != nil && cloned.Status == corev1.ConditionFalse:
		return 0, r.failed(ctx, m, cloned.Reason, cloned.Message)
	case p.Status.Phase == corev1.PodFailed:
		return 0, r.failed(ctx, m, p.Status.Reason, p.Status.Message)
	}
	reason := ""
	if cloned != nil {
		reason = cloned.Reason
	}
	if m.Status.Reason != v1alpha1.MigrationTimedOut {
		m.Status.Reason, m.Status.Message = reason, ""
		if cloned != nil {
			m.Status.Message = cloned.Message
		} else if s := condition(p, corev1.PodScheduled); s != nil && s.Status == corev1.ConditionFalse {
			m.Status.Reason, m.Status.Message = s.Reason, s.Message
		}
	}
	// A kubelet that waits for something tells that by a reason of no phase.
	if next := phaseFor(reason, p.Spec.NodeName != ""); slices.Index(course, next) > slices.Index(course, m.Status.Phase) {
		m.Status.Phase = next
	}

	deadline := r.began(m).Add(time.Duration(m.Spec.TimeoutSeconds) * time.Second)
	left := deadline.Sub(r.Now())
	if left <= 0 && m.Status.Reason != v1alpha1.MigrationTimedOut {
		text := fmt.Sprintf("It took longer than %d seconds.", m.Spec.TimeoutSeconds)
		if p.Spec.NodeName == "" {
			text = fmt.Sprintf("No node took the clone in %d seconds: %s", m.Spec.TimeoutSeconds, m.Status.Message)
		}
		m.Status.Reason, m.Status.Message = v1alpha1.MigrationTimedOut, text
	}
	if left <= 0 || !m.DeletionTimestamp.IsZero() {
		return time.Second, r.cancel(ctx, p)
	}
	return left, nil
}

// measure takes over how much was moved.
func measure(m *v1alpha1.PodMigration, c *corev1.PodCondition) {
	if c == nil {
		return
	}
	for text := range strings.FieldsSeq(c.Message) {
		key, value, _ := strings.Cut(text, "=")
		n, err := strconv.ParseInt(value, 10, 64)
		switch {
		case err != nil:
		case key == v1alpha1.TransferBytes:
			m.Status.TransferredBytes = n
		case key == v1alpha1.TransferExpected:
			m.Status.ExpectedFreezeMilliseconds = &n
		case key == v1alpha1.TransferFrozen:
			m.Status.FrozenMilliseconds = &n
		}
	}
}

// began is when the clone was ordered.
func (r *Migrations) began(m *v1alpha1.PodMigration) time.Time {
	i := slices.IndexFunc(m.Status.PhaseTransitions, func(t v1alpha1.PhaseTransition) bool { return t.Phase == v1alpha1.PhaseScheduling })
	if i < 0 {
		return r.Now()
	}
	return m.Status.PhaseTransitions[i].Time.Time
}

// course has the phases in the order in which they follow each other.
var course = []v1alpha1.Phase{
	v1alpha1.PhasePending, v1alpha1.PhaseScheduling, v1alpha1.PhasePreparing,
	v1alpha1.PhaseTransferring, v1alpha1.PhaseFreezing, v1alpha1.PhaseRestoring,
}

// phaseFor is the phase of a clone whose condition has a reason.
func phaseFor(reason string, scheduled bool) v1alpha1.Phase {
	switch reason {
	case v1alpha1.ReasonReceiving:
		return v1alpha1.PhaseTransferring
	case v1alpha1.ReasonFreezing, v1alpha1.ReasonCommitting:
		return v1alpha1.PhaseFreezing
	case v1alpha1.ReasonRestoring, v1alpha1.ReasonResumingAfterRestart:
		return v1alpha1.PhaseRestoring
	}
	if scheduled {
		return v1alpha1.PhasePreparing
	}
	return v1alpha1.PhaseScheduling
}

// cancel asks the clone's kubelet to give up. A deletion would end the pod if the source
// had just been given away; the kubelet knows, and goes on then.
func (r *Migrations) cancel(ctx context.Context, p *corev1.Pod) error {
	if p.Spec.NodeName == "" {
		// No kubelet has it. Bound meanwhile, it is another version.
		err := r.Delete(ctx, p, client.Preconditions{UID: &p.UID, ResourceVersion: &p.ResourceVersion})
		if apierrors.IsConflict(err) {
			return nil
		}
		return client.IgnoreNotFound(err)
	}
	if p.Annotations[v1alpha1.AnnotationCancel] != "" {
		return nil
	}
	before := p.DeepCopy()
	metav1.SetMetaDataAnnotation(&p.ObjectMeta, v1alpha1.AnnotationCancel, "true")
	return client.IgnoreNotFound(r.Patch(ctx, p, client.MergeFrom(before)))
}

// failed ends a migration whose clone has not taken over.
func (r *Migrations) failed(ctx context.Context, m *v1alpha1.PodMigration, reason, message string) error {
	source, err := r.source(ctx, m)
	if err != nil {
		return err
	}
	froze := slices.ContainsFunc(m.Status.PhaseTransitions, func(t v1alpha1.PhaseTransition) bool {
		return t.Phase == v1alpha1.PhaseFreezing || t.Phase == v1alpha1.PhaseRestoring
	})
	phase := v1alpha1.PhaseRefused
	switch {
	case source == nil || phaseOf(source) != string(corev1.PodRunning):
		phase = v1alpha1.PhaseFailed
	case m.Status.Reason == v1alpha1.MigrationTimedOut:
		phase, reason, message = v1alpha1.PhaseRolledBack, m.Status.Reason, m.Status.Message
	case reason == v1alpha1.ReasonCancelled:
		phase = v1alpha1.PhaseCancelled
	case reason == v1alpha1.ReasonDryRun:
		phase = v1alpha1.PhaseSucceeded
	case froze || !refusal(reason):
		phase = v1alpha1.PhaseRolledBack
	}
	end(m, phase, reason, message)
	return nil
}

// refusal tells whether a reason comes from before the first byte was sent.
func refusal(reason string) bool {
	return slices.Contains([]string{
		v1alpha1.ReasonMigrationDisabled, v1alpha1.ReasonTargetUnfit, v1alpha1.ReasonSourceRefused,
		v1alpha1.ReasonSourceLost, v1alpha1.ReasonSourceUnreachable, v1alpha1.ReasonPrepareFailed,
	}, reason) || !slices.Contains(failures, reason)
}

// failures are the reasons of the condition Cloned for clones that have not taken over.
// Others are a kubelet's or the scheduler's, from before the migration began.
var failures = []string{
	v1alpha1.ReasonStreamFailed, v1alpha1.ReasonFreezeFailed, v1alpha1.ReasonVerifyFailed, v1alpha1.ReasonRestoreFailed,
	v1alpha1.ReasonJournalFailed, v1alpha1.ReasonDeadlineExceeded, v1alpha1.ReasonCancelled, v1alpha1.ReasonKubeletRestarted,
	v1alpha1.ReasonRuntimeRestarted, v1alpha1.ReasonOwnershipRevoked,
}

// end sets how a migration ends.
func end(m *v1alpha1.PodMigration, phase v1alpha1.Phase, reason, message string) {
	m.Status.Phase, m.Status.Reason, m.Status.Message = phase, reason, message
}

// settle removes what a migration that is over does not need any more, the migration
// itself at last.
func (r *Migrations) settle(ctx context.Context, m *v1alpha1.PodMigration) (ctrl.Result, error) {
	unfinished := false
	switch {
	case m.Status.Phase == v1alpha1.PhaseSucceeded && !m.Spec.DryRun:
		var err error
		if unfinished, err = r.removeSource(ctx, m); err != nil {
			return ctrl.Result{}, err
		}
	case m.Status.ClonePodUID != "":
		// It has failed for good and says why in our status.
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Status.ClonePodName}}
		err := r.Delete(ctx, p, client.Preconditions{UID: &m.Status.ClonePodUID})
		if client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
			return ctrl.Result{}, fmt.Errorf("delete the clone that failed: %w", err)
		}
	}
	held, err := r.evict(ctx, m)
	if err != nil {
		return ctrl.Result{}, err
	}
	if controllerutil.ContainsFinalizer(m, v1alpha1.FinalizerCancel) {
		before := m.DeepCopy()
		controllerutil.RemoveFinalizer(m, v1alpha1.FinalizerCancel)
		if err := r.Patch(ctx, m, client.MergeFrom(before)); err != nil {
			return ctrl.Result{}, client.IgnoreNotFound(err)
		}
	}
	if held {
		return ctrl.Result{RequeueAfter: evictInterval}, nil
	}
	if m.Spec.TTLSecondsAfterFinished == nil || !m.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	left := ended(m).Add(time.Duration(*m.Spec.TTLSecondsAfterFinished) * time.Second).Sub(r.Now())
	if left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	if unfinished {
		return ctrl.Result{RequeueAfter: 10 * time.Second}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(r.Delete(ctx, m, client.Preconditions{UID: &m.UID}))
}

// evictInterval is when a pod that may not be evicted now is tried again.
const evictInterval = 5 * time.Second

// evict evicts a pod that could not be moved, if the migration says so. It is held while a
// disruption budget forbids it.
func (r *Migrations) evict(ctx context.Context, m *v1alpha1.PodMigration) (held bool, err error) {
	failed := m.Status.Phase == v1alpha1.PhaseRefused || m.Status.Phase == v1alpha1.PhaseRolledBack
	if !failed || m.Spec.OnFailure != v1alpha1.FailureEvict || m.Spec.DryRun || !m.DeletionTimestamp.IsZero() || m.Status.SourcePodUID == "" {
		return false, nil
	}
	source, err := r.source(ctx, m)
	if err != nil || source == nil || source.GetDeletionTimestamp() != nil || phaseOf(source) != string(corev1.PodRunning) {
		return false, err
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Spec.PodName}}
	err = r.SubResource("eviction").Create(ctx, pod, &policyv1.Eviction{
		ObjectMeta:    metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Spec.PodName},
		DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &m.Status.SourcePodUID}},
	})
	switch {
	case apierrors.IsTooManyRequests(err):
		return true, nil
	case apierrors.IsNotFound(err), apierrors.IsConflict(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("evict the pod that could not be moved: %w", err)
	}
	r.Recorder.Eventf(m, pod, corev1.EventTypeNormal, "Evicted", "Migrate", "Pod %s could not be moved and is evicted, as onFailure asks.", m.Spec.PodName)
	return false, nil
}

// ended is when the phase of a migration began, for one that is over its end.
func ended(m *v1alpha1.PodMigration) time.Time {
	if n := len(m.Status.PhaseTransitions); n > 0 {
		return m.Status.PhaseTransitions[n-1].Time.Time
	}
	return m.CreationTimestamp.Time
}

// removeSource deletes a source that was given away and that has a controller: there it
// would stand as a replica that failed. One without stays as a record. It is unfinished
// as long as the source's kubelet is not done with it.
func (r *Migrations) removeSource(ctx context.Context, m *v1alpha1.PodMigration) (unfinished bool, err error) {
	source, err := r.source(ctx, m)
	if err != nil || source == nil || source.GetDeletionTimestamp() != nil || metav1.GetControllerOf(source) == nil {
		return false, err
	}
	if phaseOf(source) != string(corev1.PodFailed) {
		return true, nil
	}
	err = r.Delete(ctx, source, client.Preconditions{UID: &m.Status.SourcePodUID})
	if client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
		return false, fmt.Errorf("delete the source that was given away: %w", err)
	}
	return false, nil
}

// tell makes an event of the end.
func (r *Migrations) tell(m *v1alpha1.PodMigration) {
	kind := corev1.EventTypeWarning
	if m.Status.Phase == v1alpha1.PhaseSucceeded || m.Status.Phase == v1alpha1.PhaseCancelled {
		kind = corev1.EventTypeNormal
	}
	r.Recorder.Eventf(m, nil, kind, string(m.Status.Phase), "Migrate", "%s", m.Status.Message)
}

func condition(p *corev1.Pod, name corev1.PodConditionType) *corev1.PodCondition {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == name {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}
