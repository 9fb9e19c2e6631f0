package agent

import (
	"context"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/klog/v2"
)

// awaitLimit bounds how long a kubelet takes to learn of its pods after its start.
const awaitLimit = 20 * time.Second

// await returns a pod of this node, nil if it is gone. A kubelet that has just started
// reads its journal before it knows any pod. What ends a pod has to reach its pod
// worker, or that would start the pod's containers again, so it waits until the
// kubelet knows what the API server knows.
func (a *Agent) await(ctx context.Context, namespace, name, uid string) (*v1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, awaitLimit)
	defer cancel()
	for {
		if pod, ok := a.cfg.Node.Pod(uid); ok {
			return pod, nil
		}
		pod, err := a.cfg.API.Pod(ctx, namespace, name)
		switch {
		case apierrors.IsNotFound(err), apierrors.IsForbidden(err), err == nil && string(pod.UID) != uid:
			return nil, nil
		case err != nil:
			return nil, fmt.Errorf("read pod %s, which the kubelet does not know: %w", name, err)
		}
		// The kubelet does not say when it has heard of its pods.
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the kubelet does not know pod %s, which is on its node: %w", name, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// event records an event on a pod of this node, also on one that the kubelet does not
// know yet.
func (a *Agent) event(ctx context.Context, namespace, name, uid string, warning bool, reason, message string) {
	pod, ok := a.cfg.Node.Pod(uid)
	if !ok {
		var err error
		if pod, err = a.cfg.API.Pod(ctx, namespace, name); err != nil || string(pod.UID) != uid {
			klog.FromContext(ctx).Info("No pod to record an event on", "reason", reason, "message", message, "err", err)
			return
		}
	}
	a.cfg.Node.Event(ctx, pod, warning, reason, message)
}
