//go:build podmig_patched

package inject

import (
	"context"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"

	"github.com/prometheus/procfs"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubelettypes "k8s.io/kubelet/pkg/types"
	"k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/kuberuntime"

	"podmig.dev/podmig/kubelet/agent"
)

// node is the kubelet as the agent sees it.
type node struct{ kl *kubelet.Kubelet }

func (n *node) Name() string                { return string(n.kl.NodeName()) }
func (n *node) ClonePod(pod *v1.Pod) string { return pod.Spec.ClonePod }
func (n *node) AddedPrivileges(clone, source *v1.Pod) []string {
	var added []string
	for _, e := range kubelet.AddedPrivileges(clone, source) {
		added = append(added, e.Error())
	}
	return added
}
func (n *node) Pod(uid string) (*v1.Pod, bool) {
	return n.kl.PodByUID(types.UID(uid))
}
func (n *node) PodByName(namespace, name string) (*v1.Pod, bool) {
	return n.kl.GetPodByName(namespace, name)
}
func (n *node) Terminate(ctx context.Context, pod *v1.Pod, status func(*v1.PodStatus)) {
	n.kl.TerminatePod(ctx, pod, status)
}
func (n *node) Event(_ context.Context, pod *v1.Pod, warning bool, reason, message string) {
	kind := v1.EventTypeNormal
	if warning {
		kind = v1.EventTypeWarning
	}
	n.kl.Recorder().Event(pod, kind, reason, message)
}
func (n *node) EmptyDir(podUID, volume string) string {
	return n.kl.EmptyDirPath(types.UID(podUID), volume)
}
func (n *node) LogDirectory(pod *v1.Pod, container string) string {
	return kuberuntime.BuildContainerLogsDirectory(n.kl.PodLogsDirectory(), pod.Namespace, pod.Name, pod.UID, container)
}

// MemoryAvailable is the kernel's own estimate.
func (n *node) MemoryAvailable() uint64 {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return 0
	}
	m, err := fs.Meminfo()
	if err != nil || m.MemAvailableBytes == nil {
		return 0
	}
	return *m.MemAvailableBytes
}

// apiServer reads and writes what the agent needs there.
type apiServer struct{ c clientset.Interface }

func (a *apiServer) Pod(ctx context.Context, namespace, name string) (*v1.Pod, error) {
	return a.c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (a *apiServer) Kubelet(ctx context.Context, name string) (string, error) {
	n, err := a.c.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(n.Status.Addresses, func(x v1.NodeAddress) bool { return x.Type == v1.NodeInternalIP })
	port := n.Status.DaemonEndpoints.KubeletEndpoint.Port
	if i < 0 || port == 0 {
		return "", fmt.Errorf("node %s does not say where its kubelet serves; wait until it is ready", name)
	}
	return net.JoinHostPort(n.Status.Addresses[i].Address, strconv.Itoa(int(port))), nil
}

func (a *apiServer) Fenced(ctx context.Context, name string) (bool, error) {
	n, err := a.c.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(n.Spec.Taints, func(t v1.Taint) bool { return t.Key == v1.TaintNodeOutOfService }), nil
}

func (a *apiServer) PatchStatus(ctx context.Context, namespace, name, uid string, change func(*v1.PodStatus)) error {
	pods := a.c.CoreV1().Pods(namespace)
	return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		pod, err := pods.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if string(pod.UID) != uid {
			// Another pod of this name: the one that is meant is gone.
			return apierrors.NewNotFound(v1.Resource("pods"), name)
		}
		pod = pod.DeepCopy()
		change(&pod.Status)
		_, err = pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{})
		return err
	})
}

// containers is the runtime past the guard.
type containers struct{ runtime internalapi.RuntimeService }

func (c *containers) Of(ctx context.Context, podUID string) (string, []agent.Container, error) {
	selector := map[string]string{kubelettypes.KubernetesPodUIDLabel: podUID}
	sandboxes, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{
		LabelSelector: selector, State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	})
	if err != nil {
		return "", nil, err
	}
	sandbox := ""
	newest := int64(math.MinInt64)
	for _, s := range sandboxes {
		if s.CreatedAt > newest {
			sandbox, newest = s.Id, s.CreatedAt
		}
	}
	list, err := c.runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: selector})
	if err != nil {
		return "", nil, err
	}
	slices.SortFunc(list, func(a, b *runtimeapi.Container) int {
		return int(b.Metadata.GetAttempt()) - int(a.Metadata.GetAttempt())
	})
	var cs []agent.Container
	for _, x := range list {
		if slices.ContainsFunc(cs, func(y agent.Container) bool { return y.Name == x.Metadata.GetName() }) {
			continue
		}
		cs = append(cs, agent.Container{
			Name: x.Metadata.GetName(), ID: x.Id, Attempt: x.Metadata.GetAttempt(),
			Created: x.State == runtimeapi.ContainerState_CONTAINER_CREATED,
			Running: x.State == runtimeapi.ContainerState_CONTAINER_RUNNING,
		})
	}
	return sandbox, cs, nil
}

func (c *containers) LogPath(ctx context.Context, id string) (string, error) {
	r, err := c.runtime.ContainerStatus(ctx, id, false)
	return r.GetStatus().GetLogPath(), err
}

func (c *containers) Stop(ctx context.Context, id string) error {
	return c.runtime.StopContainer(ctx, id, 0)
}
