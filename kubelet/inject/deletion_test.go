//go:build podmig_patched

package inject

import (
	"context"
	"slices"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

type deletionNode struct {
	pods   map[string]*v1.Pod
	events []string
}

func (n *deletionNode) Pod(uid string) (*v1.Pod, bool) {
	p, ok := n.pods[uid]
	return p, ok
}

func (n *deletionNode) Event(_ context.Context, p *v1.Pod, _ bool, reason, _ string) {
	n.events = append(n.events, string(p.UID)+" "+reason)
}

func TestDeletions(t *testing.T) {
	now := time.Unix(1000, 0)
	n := &deletionNode{pods: map[string]*v1.Pod{}}
	terminating := map[types.UID]bool{}
	d := &deletions{node: n, terminating: func(uid types.UID) bool { return terminating[uid] }, now: func() time.Time { return now }, told: map[types.UID]bool{}}
	pod := func(uid string, grace int64, finalizers ...string) *v1.Pod {
		p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{
			UID: types.UID(uid), Finalizers: finalizers, Annotations: map[string]string{v1alpha1.AnnotationDeadline: "60"},
			DeletionGracePeriodSeconds: &grace, DeletionTimestamp: &metav1.Time{Time: now.Add(time.Duration(grace) * time.Second)},
		}}
		n.pods[uid] = p
		return p
	}
	expect := func(p *v1.Pod, sync bool, events ...string) {
		t.Helper()
		n.events = nil
		if got := d.ShouldSync(p); got != sync || !slices.Equal(n.events, events) {
			t.Errorf("pod %s: sync %v, events %q; want %v, %q", p.UID, got, n.events, sync, events)
		}
	}
	plain := pod("plain", 30)
	forced := pod("forced", 0, v1alpha1.FinalizerMigrate)
	a := pod("a", 30, v1alpha1.FinalizerMigrate)
	expect(plain, false)
	expect(forced, true)
	expect(a, false, "a DeletionWaits")
	expect(a, false)
	now = now.Add(59 * time.Second)
	expect(a, false)
	now = now.Add(time.Second)
	expect(a, true, "a MigrationDeadlineExceeded")
	terminating["a"], terminating["forced"] = true, true
	expect(a, false)
	expect(forced, false)
	// What is gone is forgotten.
	delete(n.pods, "a")
	expect(pod("b", 30, v1alpha1.FinalizerMigrate), false, "b DeletionWaits")
	if len(d.told) != 1 {
		t.Errorf("%d pods are remembered", len(d.told))
	}
}
