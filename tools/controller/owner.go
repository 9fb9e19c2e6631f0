package controller

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// ownerKind is what a controller of pods is to us.
type ownerKind int

const (
	// nobody owns the pod.
	nobody ownerKind = iota
	// set is a controller that counts a source and its clone once; the clone belongs to it as the
	// source does.
	set
	// migratingPod is our own.
	migratingPod
	// stranger would replace the pod while it moves.
	stranger
)

// kindOf tells what controls a pod.
func kindOf(owner *metav1.OwnerReference) ownerKind {
	if owner == nil {
		return nobody
	}
	group, _, _ := strings.Cut(owner.APIVersion, "/")
	switch {
	case group == v1alpha1.GroupVersion.Group && owner.Kind == "MigratingPod":
		return migratingPod
	case group == "apps" && owner.Kind == "ReplicaSet", owner.APIVersion == "v1" && owner.Kind == "ReplicationController":
		return set
	}
	return stranger
}

// immovable says why a pod with this controller cannot be moved, nothing if it can.
func immovable(pod string, owner *metav1.OwnerReference) string {
	if kindOf(owner) != stranger {
		return ""
	}
	why := "which would replace it while it moves"
	switch owner.Kind {
	case "StatefulSet":
		why = "whose pods have fixed names, so that there cannot be two of one while it moves"
	case "DaemonSet":
		why = "whose pods belong to their nodes"
	case "Job":
		why = "which would count it as failed"
	}
	return fmt.Sprintf("Pod %q belongs to %s %s, %s; only pods of ReplicaSets (also those of Deployments), of MigratingPods and without a controller can be moved.",
		pod, owner.Kind, owner.Name, why)
}

// ownerGone tells whether the controller of a pod does not exist any more or is being
// deleted, so that the pod is not wanted.
func ownerGone(ctx context.Context, r client.Reader, namespace string, owner *metav1.OwnerReference) (bool, error) {
	o := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: owner.APIVersion, Kind: owner.Kind}}
	err := r.Get(ctx, client.ObjectKey{Namespace: namespace, Name: owner.Name}, o)
	switch {
	case apierrors.IsNotFound(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("read %s %s: %w", owner.Kind, owner.Name, err)
	}
	return o.UID != owner.UID || o.DeletionTimestamp != nil, nil
}

// children are the pods that an object controls.
func children(ctx context.Context, r client.Reader, namespace string, owner *metav1.OwnerReference) ([]*corev1.Pod, error) {
	var all corev1.PodList
	if err := r.List(ctx, &all, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("list the pods of namespace %s: %w", namespace, err)
	}
	var out []*corev1.Pod
	for i := range all.Items {
		if c := metav1.GetControllerOf(&all.Items[i]); c != nil && c.UID == owner.UID {
			out = append(out, &all.Items[i])
		}
	}
	return out, nil
}

// numberOf is the number at the end of the name of a MigratingPod's pod; false if there is
// none.
func numberOf(owner, pod string) (int, bool) {
	text, ok := strings.CutPrefix(pod, owner+"-")
	if !ok {
		return 0, false
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || strconv.Itoa(n) != text {
		return 0, false
	}
	return n, true
}

// nextName is the first name that none of a MigratingPod's pods has had.
func nextName(owner string, pods ...string) string {
	next := 0
	for _, p := range pods {
		if n, ok := numberOf(owner, p); ok {
			next = max(next, n+1)
		}
	}
	return owner + "-" + strconv.Itoa(next)
}

// source is the name of the pod that a clone of ours takes over. Our API types do not
// have spec.clonePod.
func source(p *corev1.Pod) string { return p.Annotations[v1alpha1.AnnotationSource] }

// arriving tells whether a pod is a clone that does not run yet. Its kubelet writes on its
// own that it has taken over, maybe before it writes that it runs.
func arriving(p *corev1.Pod) bool {
	return source(p) != "" && (!deferral.Cloned(p) || p.Status.Phase == corev1.PodPending)
}

// cut shortens a name so that something can be put behind it with a dash.
func cut(name string, size int) string {
	if len(name) <= size {
		return name
	}
	return strings.TrimRight(name[:size], "-.")
}
