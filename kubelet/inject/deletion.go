//go:build podmig_patched

package inject

import (
	"context"
	"fmt"
	"maps"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// deletions wakes the kubelet when the deletion of a pod waits no longer, and says on the
// pod that it waits. The kubelet's sync loop, one goroutine, asks about every pod once a
// second.
type deletions struct {
	node interface {
		Pod(uid string) (*v1.Pod, bool)
		Event(ctx context.Context, pod *v1.Pod, warning bool, reason, message string)
	}
	// terminating tells whether the kubelet ends a pod already.
	terminating func(types.UID) bool
	now         func() time.Time
	// told are the pods of which it was said that they wait.
	told map[types.UID]bool
}

// ShouldSync tells whether a pod has to be looked at although nothing has changed.
func (d *deletions) ShouldSync(pod *v1.Pod) bool {
	if pod.DeletionTimestamp == nil || !deferral.HasFinalizer(pod) || d.terminating(pod.UID) {
		return false
	}
	limit, _ := deferral.Limit(pod)
	if !deferral.Waits(pod, d.now()) {
		if !deferral.Forced(pod) {
			d.node.Event(context.Background(), pod, true, v1alpha1.EventDeadlineExceeded,
				fmt.Sprintf("The pod was to move within %s of its deletion and has not; it ends like any other pod.", limit))
		}
		return true
	}
	if !d.told[pod.UID] {
		maps.DeleteFunc(d.told, func(uid types.UID, _ bool) bool {
			_, known := d.node.Pod(string(uid))
			return !known
		})
		d.told[pod.UID] = true
		d.node.Event(context.Background(), pod, false, v1alpha1.EventDeletionWaits,
			fmt.Sprintf("The pod runs on until it has moved, at most %s from its deletion.", limit))
	}
	return false
}
