package controller

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// MigratingPods keeps one pod of every MigratingPod running. It makes pods from the
// template and never moves one: what moves is a pod that is being deleted (Deletions), or that
// somebody has made a PodMigration for.
type MigratingPods struct {
	client.Client
	// Live reads what decisions depend on that cannot be taken back.
	Live     client.Reader
	Recorder events.EventRecorder
	Now      func() time.Time
}

// SetupWithManager lets a manager call the reconciler.
func (r *MigratingPods) SetupWithManager(mgr ctrl.Manager) error {
	// Their messages say why a pod still waits.
	migrations := handler.EnqueueRequestForOwner(mgr.GetScheme(), mgr.GetRESTMapper(), &v1alpha1.MigratingPod{})
	return ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.MigratingPod{}).
		Owns(&corev1.Pod{}).
		Watches(&v1alpha1.PodMigration{}, migrations).
		Complete(r)
}

// Reconcile looks at one MigratingPod.
func (r *MigratingPods) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	mp := &v1alpha1.MigratingPod{}
	// Live: a status from before the last step would start a second pod.
	if err := r.Live.Get(ctx, req.NamespacedName, mp); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if mp.DeletionTimestamp != nil {
		// The garbage collector deletes its pods, and Deletions lets them go.
		return ctrl.Result{}, nil
	}
	before := mp.DeepCopy()
	mp.Status.ObservedGeneration = mp.Generation
	err := r.step(ctx, mp)
	if mp.Status.State != before.Status.State {
		log.FromContext(ctx).Info("MigratingPod goes on", "state", mp.Status.State, "pod", mp.Status.ActivePod, "node", mp.Status.NodeName, "message", mp.Status.Message)
	}
	if !equality.Semantic.DeepEqual(mp.Status, before.Status) {
		if err := r.Status().Patch(ctx, mp, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return ctrl.Result{}, client.IgnoreNotFound(err)
		}
	}
	return ctrl.Result{}, err
}

// step looks at the pods of a MigratingPod, makes one if there is none, and changes the status.
func (r *MigratingPods) step(ctx context.Context, mp *v1alpha1.MigratingPod) error {
	owner := metav1.NewControllerRef(mp, v1alpha1.GroupVersion.WithKind("MigratingPod"))
	pods, err := children(ctx, r.Live, mp.Namespace, owner)
	if err != nil {
		return err
	}
	counted, others := deferral.Replicas(pods, source, r.Now())
	s := &mp.Status
	switch len(counted) {
	case 0:
		setReady(mp, nil)
		// A pod that still ends may still run.
		if i := slices.IndexFunc(others, func(p *corev1.Pod) bool { return !deferral.Ended(p) }); i >= 0 {
			s.State, s.Message = v1alpha1.StateCreating, fmt.Sprintf(
				"Waits until pod %s has ended. If its node %s is lost for good, take the node out of service: its pods are deleted then.", others[i].Name, others[i].Spec.NodeName)
			return nil
		}
		return r.start(ctx, mp, others)
	case 1:
	default:
		var names []string
		for _, p := range counted {
			names = append(names, p.Name)
		}
		slices.Sort(names)
		s.State, s.Message = v1alpha1.StateInvalid, fmt.Sprintf("There are %d pods and there should be one: %s. Delete those that are too many.", len(names), strings.Join(names, ", "))
		setReady(mp, nil)
		return nil
	}
	active := counted[0]
	if source(active) != "" && source(active) == s.ActivePod && !deferral.Cloned(active) {
		// The source has ended, and it is not said yet that the clone has taken over.
		s.State, s.Message = v1alpha1.StateMigrating, ""
		setReady(mp, active)
		return nil
	}
	if s.ActivePod != active.Name {
		if source(active) == "" {
			// It was started, and that could not be written down.
			r.started(mp, active, others)
		} else {
			s.Moves++
		}
	}
	s.ActivePod, s.NodeName = active.Name, active.Spec.NodeName
	setReady(mp, active)
	clone := slices.ContainsFunc(others, func(p *corev1.Pod) bool { return source(p) == active.Name && !deferral.Ended(p) })
	s.Message = ""
	switch {
	case clone, arriving(active):
		s.State = v1alpha1.StateMigrating
	case active.DeletionTimestamp != nil:
		s.State = v1alpha1.StateMigrationPending
		if s.Message, err = r.why(ctx, active); err != nil {
			return err
		}
	case active.Status.Phase != corev1.PodRunning:
		s.State = v1alpha1.StateCreating
		if c := condition(active, corev1.PodScheduled); c != nil && c.Status == corev1.ConditionFalse {
			s.Message = c.Message
		}
	default:
		s.State = v1alpha1.StateRunning
		return r.clear(ctx, mp, others)
	}
	return nil
}

// why is what the last attempt to move a pod has to say.
func (r *MigratingPods) why(ctx context.Context, p *corev1.Pod) (string, error) {
	var all v1alpha1.PodMigrationList
	if err := r.List(ctx, &all, client.InNamespace(p.Namespace)); err != nil {
		return "", fmt.Errorf("list migrations: %w", err)
	}
	var last *v1alpha1.PodMigration
	for i := range all.Items {
		if m := &all.Items[i]; m.Status.SourcePodUID == p.UID && (last == nil || m.CreationTimestamp.After(last.CreationTimestamp.Time)) {
			last = m
		}
	}
	if last == nil {
		return "", nil
	}
	return last.Status.Message, nil
}

// start makes a pod from the template. ended are the pods there were.
func (r *MigratingPods) start(ctx context.Context, mp *v1alpha1.MigratingPod, ended []*corev1.Pod) error {
	s := &mp.Status
	names := []string{s.ActivePod}
	for _, p := range ended {
		names = append(names, p.Name)
	}
	p := podOf(mp, nextName(mp.Name, names...))
	err := r.Create(ctx, p)
	switch {
	case apierrors.IsAlreadyExists(err):
		// Ours and not yet seen, or a stranger's.
		existing := &corev1.Pod{}
		if err := r.Live.Get(ctx, client.ObjectKeyFromObject(p), existing); err != nil {
			return err
		}
		if !metav1.IsControlledBy(existing, mp) {
			s.State, s.Message = v1alpha1.StateInvalid, fmt.Sprintf("There is a pod %q that does not belong to this MigratingPod; delete or rename it.", p.Name)
			return fmt.Errorf("make pod %s: there is another pod of this name", p.Name)
		}
		return nil
	case apierrors.IsInvalid(err), apierrors.IsForbidden(err), apierrors.IsBadRequest(err):
		s.State, s.Message = v1alpha1.StateInvalid, fmt.Sprintf("The API server refuses the pod: %s.", err)
		return fmt.Errorf("make pod %s: %w", p.Name, err)
	case err != nil:
		return fmt.Errorf("make pod %s: %w", p.Name, err)
	}
	r.started(mp, p, ended)
	s.State, s.ActivePod, s.NodeName, s.Message = v1alpha1.StateCreating, p.Name, "", ""
	return nil
}

// started tells that a pod was made from the template: the first one, or one without the
// state of the last.
func (r *MigratingPods) started(mp *v1alpha1.MigratingPod, p *corev1.Pod, ended []*corev1.Pod) {
	cold := metav1.Condition{Type: v1alpha1.ConditionColdStarted, Status: metav1.ConditionFalse, Reason: "FirstStart", Message: "No pod has ended without another one taking over.", ObservedGeneration: mp.Generation}
	if last := mp.Status.ActivePod; last != "" {
		cold.Status, cold.Reason = metav1.ConditionTrue, "PodDeleted"
		cold.Message = fmt.Sprintf("Pod %s was deleted without having moved; %s was started from the template, without its state.", last, p.Name)
		if i := slices.IndexFunc(ended, func(p *corev1.Pod) bool { return p.Name == last }); i >= 0 {
			cold.Reason = cmp.Or(reasonWord(ended[i].Status.Reason), "PodEnded")
			cold.Message = fmt.Sprintf("Pod %s has ended without having moved (%s); %s was started from the template, without its state.",
				last, cmp.Or(ended[i].Status.Message, ended[i].Status.Reason, "no reason given"), p.Name)
		}
		r.Recorder.Eventf(mp, p, corev1.EventTypeWarning, v1alpha1.ConditionColdStarted, "Start", "%s", cold.Message)
	}
	apimeta.SetStatusCondition(&mp.Status.Conditions, cold)
}

// reasonWord is a pod's reason if it can be that of a condition.
func reasonWord(reason string) string {
	for i, c := range reason {
		letter := c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z'
		if !letter && (i == 0 || c != '_' && (c < '0' || c > '9')) {
			return ""
		}
	}
	return reason
}

// podOf is the pod that the template describes.
func podOf(mp *v1alpha1.MigratingPod, name string) *corev1.Pod {
	t := mp.Spec.Template.DeepCopy()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: mp.Namespace, Name: name, Labels: t.Labels, Annotations: t.Annotations, Finalizers: t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(mp, v1alpha1.GroupVersion.WithKind("MigratingPod"))},
		},
		Spec: t.Spec,
	}
	controllerutil.AddFinalizer(p, v1alpha1.FinalizerMigrate)
	if d := mp.Spec.Strategy.DeadlineSeconds; d != nil {
		metav1.SetMetaDataAnnotation(&p.ObjectMeta, v1alpha1.AnnotationDeadline, strconv.Itoa(int(*d)))
	}
	for key, value := range mp.Spec.NodeSelector {
		if p.Spec.NodeSelector == nil {
			p.Spec.NodeSelector = map[string]string{}
		}
		p.Spec.NodeSelector[key] = value
	}
	return p
}

// clear deletes the pods that have ended, once another one runs.
func (r *MigratingPods) clear(ctx context.Context, mp *v1alpha1.MigratingPod, others []*corev1.Pod) error {
	for _, p := range others {
		if !deferral.Ended(p) || p.DeletionTimestamp != nil {
			continue
		}
		if err := r.Delete(ctx, p, client.Preconditions{UID: &p.UID}); client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
			return fmt.Errorf("delete pod %s of MigratingPod %s, which has ended: %w", p.Name, mp.Name, err)
		}
	}
	return nil
}

// setReady takes over whether the active pod is ready.
func setReady(mp *v1alpha1.MigratingPod, active *corev1.Pod) {
	c := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: "NoPod", Message: "No pod runs.", ObservedGeneration: mp.Generation}
	if active != nil {
		c.Reason, c.Message = "PodNotReady", fmt.Sprintf("Pod %s is not ready.", active.Name)
		if ready := condition(active, corev1.PodReady); ready != nil && ready.Status == corev1.ConditionTrue {
			c.Status, c.Reason, c.Message = metav1.ConditionTrue, "PodReady", fmt.Sprintf("Pod %s is ready.", active.Name)
		}
	}
	apimeta.SetStatusCondition(&mp.Status.Conditions, c)
}
