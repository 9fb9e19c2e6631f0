//go:build podmig_patched

package inject

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"podmig.dev/podmig/kubelet/guard"
)

// recorder is the kubelet's recorder of events. The kubelet believes that it starts
// the containers of a clone when it creates them; the event that says so waits until
// they are restored, and is never recorded if they are not.
type recorder struct {
	record.EventRecorderLogger
	guard *guard.Guard
}

func (r *recorder) Event(object runtime.Object, kind, reason, message string) {
	say := func() { r.EventRecorderLogger.Event(object, kind, reason, message) }
	if ref, ok := object.(*v1.ObjectReference); ok && reason == events.StartedContainer && r.guard.Later(string(ref.UID), say) {
		return
	}
	say()
}

func (r *recorder) WithLogger(logger klog.Logger) record.EventRecorderLogger {
	return &recorder{r.EventRecorderLogger.WithLogger(logger), r.guard}
}
