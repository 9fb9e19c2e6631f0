//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// waitingPod has a shell whose child can be killed, and is probed.
const waitingPod = `
apiVersion: v1
kind: Pod
metadata:
  name: NAME
  labels: {app: waiting}
  finalizers: [podmig.dev/migrate]
  annotations: {podmig.dev/migrate-deadline-seconds: "SECONDS"}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 2
  containers:
  - name: redis
    image: podmig.dev/redis:v1
    imagePullPolicy: Never
    readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
    livenessProbe: {exec: {command: [sh, -c, "test ! -e /tmp/sick"]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}
`

const waitingService = `
apiVersion: v1
kind: Service
metadata: {name: waiting}
spec:
  selector: {app: waiting}
  ports: [{port: 6379}]
`

// waiting creates a pod whose deletion waits so many seconds.
func waiting(ctx context.Context, t *testing.T, k *kit.Kit, name string, seconds int) *v1.Pod {
	t.Helper()
	return start(ctx, t, k, name, strings.NewReplacer("NAME", name, "SECONDS", fmt.Sprint(seconds)).Replace(waitingPod))
}

// remove asks for the deletion of a pod and does not wait.
func remove(ctx context.Context, t *testing.T, k *kit.Kit, name string, grace ...int64) {
	t.Helper()
	var o metav1.DeleteOptions
	if len(grace) > 0 {
		o.GracePeriodSeconds = &grace[0]
	}
	if err := k.Client.CoreV1().Pods(k.Namespace).Delete(ctx, name, o); err != nil {
		t.Fatal(err)
	}
}

// release takes all finalizers from a pod.
func release(ctx context.Context, k *kit.Kit, name string) error {
	_, err := k.Client.CoreV1().Pods(k.Namespace).Patch(ctx, name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// ready are the names of the pods that a Service's endpoints have as ready.
func ready(slices []discovery.EndpointSlice) (names []string) {
	for _, s := range slices {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && *e.Conditions.Ready && e.TargetRef != nil {
				names = append(names, e.TargetRef.Name)
			}
		}
	}
	return names
}

// hasEvent waits for an event of a pod.
func hasEvent(ctx context.Context, t *testing.T, k *kit.Kit, pod, reason string) {
	t.Helper()
	until(ctx, t, fmt.Sprintf("pod %s has the event %s", pod, reason), func() error {
		if slices.ContainsFunc(k.Events(ctx, pod), func(e v1.Event) bool { return e.Reason == reason }) {
			return nil
		}
		return errors.New("it has not")
	})
}

// A pod with the finalizer goes on when it is deleted: it serves, is probed and restarted,
// also by a kubelet that was restarted itself. It ends at the deadline, when the finalizer
// goes, and when it is deleted by force. There is no controller here that would move it.
func TestDeletionWaits(t *testing.T) {
	ctx, k := begin(t, 4*time.Minute)
	apply(ctx, t, k, waitingService)
	endpoints := func() []string {
		t.Helper()
		list, err := k.Client.DiscoveryV1().EndpointSlices(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: discovery.LabelServiceName + "=waiting"})
		if err != nil {
			t.Fatal(err)
		}
		return ready(list.Items)
	}
	t.Run("it serves", func(t *testing.T) {
		p := waiting(ctx, t, k, "serves", 600)
		until(ctx, t, "it is an endpoint", func() error {
			if e := endpoints(); len(e) != 1 {
				return fmt.Errorf("they are %v", e)
			}
			return nil
		})
		r := redis{k, "serves"}
		id, _ := r.server(ctx, t)
		remove(ctx, t, k, "serves")
		hasEvent(ctx, t, k, "serves", v1alpha1.EventDeletionWaits)
		restart(ctx, t, node1, cluster.Kubelet)
		// The kubelet has been here before it looks at the pod.
		if _, err := k.WaitPod(ctx, "serves", "probed after the restart", func(now *v1.Pod) (bool, error) {
			return now.Status.Phase == v1.PodRunning && kit.Condition(now, string(v1.PodReady)).Status == v1.ConditionTrue, nil
		}); err != nil {
			t.Fatal(err)
		}
		until(ctx, t, "the kubelet knows the pod", func() error {
			_, err := k.Exec(ctx, "serves", "true")
			return err
		})
		if now, _ := r.server(ctx, t); now != id {
			t.Error("it is another redis")
		}
		// A container that is sick is killed and started again.
		if _, err := k.Exec(ctx, "serves", "touch", "/tmp/sick"); err != nil {
			t.Fatal(err)
		}
		if _, err := k.WaitPod(ctx, "serves", "restarted", func(now *v1.Pod) (bool, error) {
			return now.Status.ContainerStatuses[0].RestartCount > p.Status.ContainerStatuses[0].RestartCount && now.Status.ContainerStatuses[0].Ready, nil
		}); err != nil {
			t.Fatal(err)
		}
		now, err := k.Pod(ctx, "serves")
		if err != nil || now.DeletionTimestamp == nil || now.UID != p.UID {
			t.Errorf("the pod is %v, %v", now, err)
		}
		until(ctx, t, "it is an endpoint again", func() error {
			if e := endpoints(); len(e) != 1 {
				return fmt.Errorf("they are %v", e)
			}
			return nil
		})
		// Without the finalizer it ends.
		if err := release(ctx, k, "serves"); err != nil {
			t.Fatal(err)
		}
		until(ctx, t, "it is gone", func() error {
			_, err := k.Pod(ctx, "serves")
			if apierrors.IsNotFound(err) {
				return nil
			}
			return fmt.Errorf("it is there: %w", err)
		})
		if e := endpoints(); len(e) != 0 {
			t.Errorf("endpoints %v", e)
		}
	})
	ends := func(name string) time.Time {
		t.Helper()
		if _, err := k.WaitPod(ctx, name, "ended", func(p *v1.Pod) (bool, error) {
			return p.Status.Phase == v1.PodFailed || p.Status.Phase == v1.PodSucceeded, nil
		}); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}
	t.Run("until the deadline", func(t *testing.T) {
		waiting(ctx, t, k, "late", 4)
		begin := time.Now()
		remove(ctx, t, k, "late")
		if took := ends("late").Sub(begin); took < 4*time.Second-time.Second {
			t.Errorf("it ended after %s", took)
		}
		hasEvent(ctx, t, k, "late", v1alpha1.EventDeadlineExceeded)
	})
	t.Run("not by force", func(t *testing.T) {
		waiting(ctx, t, k, "forced", 600)
		remove(ctx, t, k, "forced", 0)
		ends("forced")
	})
	t.Run("not on a node whose gate is off", func(t *testing.T) {
		waiting(ctx, t, k, "gate-off", 600)
		back := change(ctx, t, node1, gateOff, gateOn, cluster.Kubelet)
		defer back()
		remove(ctx, t, k, "gate-off")
		ends("gate-off")
	})
}
