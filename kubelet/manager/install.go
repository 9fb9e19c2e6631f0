//go:build podmig_patched

package manager

import (
	"context"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	clientset "k8s.io/client-go/kubernetes"
	endpointutil "k8s.io/endpointslice/util"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/replicaset"
	"k8s.io/kubernetes/pkg/features"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// Install sets the hooks. They ask for the feature gate whenever they are called, because
// flags are read later.
func Install() {
	endpointutil.DeletionDeferred = waits
	replicaset.ActivePods = activePods
	replicaset.TakesOver = takesOver
	replicaset.BeforeDelete = letGo
}

func enabled() bool { return utilfeature.DefaultFeatureGate.Enabled(features.PodMigration) }

func waits(pod *v1.Pod) bool { return enabled() && deferral.Waits(pod, time.Now()) }

func clonePod(pod *v1.Pod) string { return pod.Spec.ClonePod }

func activePods(logger klog.Logger, pods []*v1.Pod) (active, others []*v1.Pod) {
	if !enabled() {
		return controller.FilterActivePods(logger, pods), pods
	}
	return deferral.Replicas(pods, clonePod, time.Now())
}

func takesOver(pod *v1.Pod) bool { return enabled() && pod.Spec.ClonePod != "" }

// letGo takes the finalizer from a pod that is one too many: it is to end, not to move.
func letGo(ctx context.Context, client clientset.Interface, pod *v1.Pod) error {
	if !enabled() || !deferral.HasFinalizer(pod) {
		return nil
	}
	// Other finalizers stay, and another pod of this name is left alone.
	patch := fmt.Appendf(nil, `{"metadata":{"uid":%q,"$deleteFromPrimitiveList/finalizers":[%q]}}`, pod.UID, v1alpha1.FinalizerMigrate)
	_, err := client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("take the finalizer %s from the pod: %w", v1alpha1.FinalizerMigrate, err)
	}
	return nil
}
