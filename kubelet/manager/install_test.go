//go:build podmig_patched

package manager

import (
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/kubernetes/fake"
	featuregatetesting "k8s.io/component-base/featuregate/testing"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/features"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

func gate(t *testing.T, on bool) {
	featuregatetesting.SetFeatureGateDuringTest(t, utilfeature.DefaultFeatureGate, features.PodMigration, on)
}

func waiting() *v1.Pod {
	grace := int64(30)
	return &v1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "ns", Name: "web", UID: "1", Finalizers: []string{"example.com/other", v1alpha1.FinalizerMigrate},
		DeletionGracePeriodSeconds: &grace, DeletionTimestamp: &metav1.Time{Time: time.Now().Add(30 * time.Second)},
	}}
}

func TestGate(t *testing.T) {
	for _, on := range []bool{false, true} {
		gate(t, on)
		source := waiting()
		clone := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-2"}, Spec: v1.PodSpec{ClonePod: "web"}}
		if waits(source) != on || takesOver(clone) != on {
			t.Errorf("gate %v: waits %v, takes over %v", on, waits(source), takesOver(clone))
		}
		active, others := activePods(klog.Background(), []*v1.Pod{source, clone})
		// With the gate off these are upstream's rules: what is being deleted does not count.
		want := clone
		if on {
			want = source
		}
		if len(active) != 1 || active[0] != want {
			t.Errorf("gate %v: %d are active", on, len(active))
		}
		if on == (len(others) == 2) {
			t.Errorf("gate %v: %d others", on, len(others))
		}
	}
}

func TestLetGo(t *testing.T) {
	for _, on := range []bool{false, true} {
		gate(t, on)
		pod := waiting()
		client := fake.NewClientset(pod.DeepCopy())
		if err := letGo(t.Context(), client, pod); err != nil {
			t.Fatal(err)
		}
		got, err := client.CoreV1().Pods("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if left := len(got.Finalizers); on && (left != 1 || got.Finalizers[0] != "example.com/other") || !on && left != 2 {
			t.Errorf("gate %v: finalizers %v", on, got.Finalizers)
		}
	}
	gate(t, true)
	// The ReplicaSet controller knows what to do about a pod that is gone.
	if err := letGo(t.Context(), fake.NewClientset(), waiting()); !apierrors.IsNotFound(err) {
		t.Errorf("a pod that is gone: %v", err)
	}
}
