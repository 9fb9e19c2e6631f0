// Package deferral knows what the finalizer podmig.dev/migrate means: the deletion of a
// pod that has it waits until the pod has moved, and while it moves two pods are one
// replica.
//
// The kubelet, the controller manager and podmig's controller all ask here, so that they
// agree: a pod whose containers go on running must stay in the endpoints and must not be
// replaced. Pure; the time comes from the caller.
package deferral

import (
	"slices"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// DefaultDeadline is how long a deletion waits if the pod does not say.
const DefaultDeadline = 10 * time.Minute

// MaxDeadline is how long it waits at most: whoever may create pods must not keep a node
// from ever being empty.
const MaxDeadline = 24 * time.Hour

// Waits tells whether a pod is being deleted and goes on as before, because it has the
// finalizer, nobody has forced the deletion and the deadline has not passed.
func Waits(pod *v1.Pod, now time.Time) bool {
	return pod.DeletionTimestamp != nil && HasFinalizer(pod) && !Forced(pod) && now.Before(Deadline(pod))
}

// HasFinalizer tells whether a pod is to be moved when it is deleted.
func HasFinalizer(pod *v1.Pod) bool {
	return slices.Contains(pod.Finalizers, v1alpha1.FinalizerMigrate)
}

// Forced tells whether a deletion gives the pod no time: somebody asked for that, no
// node has the pod, or it has ended already.
func Forced(pod *v1.Pod) bool {
	return pod.DeletionGracePeriodSeconds != nil && *pod.DeletionGracePeriodSeconds == 0
}

// Deadline is when a deletion waits no longer. The pod must have a deletion timestamp.
func Deadline(pod *v1.Pod) time.Time {
	asked := pod.DeletionTimestamp.Time
	// The API server writes down when the pod will have ended, not when somebody asked.
	if s := pod.DeletionGracePeriodSeconds; s != nil {
		asked = asked.Add(-time.Duration(*s) * time.Second)
	}
	d, _ := Limit(pod)
	return asked.Add(d)
}

// Limit is how long a deletion of the pod would wait. False says that the pod has an
// annotation for that which is no number of seconds, and gets the default.
func Limit(pod *v1.Pod) (time.Duration, bool) {
	text, ok := pod.Annotations[v1alpha1.AnnotationDeadline]
	if !ok {
		return DefaultDeadline, true
	}
	seconds, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return DefaultDeadline, false
	}
	return min(time.Duration(seconds)*time.Second, MaxDeadline), true
}

// Cloned tells whether a clone has taken over.
func Cloned(pod *v1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c v1.PodCondition) bool {
		return c.Type == v1alpha1.ConditionCloned && c.Status == v1.ConditionTrue
	})
}

// Ended tells whether a pod has no processes any more and never will.
func Ended(pod *v1.Pod) bool {
	return pod.Status.Phase == v1.PodSucceeded || pod.Status.Phase == v1.PodFailed
}

// Replicas sorts the pods of one owner into those that count and the others. Of a source
// and its clone just one counts at any time: the source as long as it is there, the
// clone from the moment on in which it says that it has taken over, whatever is known of
// the source by then. Pods that have ended or are ending do not count; while a source ends that
// has not been given away its clone does not either, since it cannot take over any more. clonePod
// is the name of the pod that a pod takes over, empty for one that is no clone.
func Replicas(pods []*v1.Pod, clonePod func(*v1.Pod) string, now time.Time) (counted, others []*v1.Pod) {
	takenOver := map[string]bool{}
	there := map[string]bool{}
	for _, p := range pods {
		there[p.Name] = !Ended(p)
		if s := clonePod(p); s != "" && Cloned(p) {
			takenOver[s] = true
		}
	}
	for _, p := range pods {
		source := clonePod(p)
		waits := source != "" && !Cloned(p) && (there[source] || takenOver[source])
		ends := Ended(p) || p.DeletionTimestamp != nil && !Waits(p, now)
		if !ends && !takenOver[p.Name] && !waits {
			counted = append(counted, p)
		} else {
			others = append(others, p)
		}
	}
	return counted, others
}
