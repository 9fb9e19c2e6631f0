// Package kit is what demo, benchmark and end-to-end tests do with a running
// cluster: create pods, move them, look at them. Every wait ends with its context and
// says what it was waiting for.
package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	watchtools "k8s.io/client-go/tools/watch"
	"sigs.k8s.io/yaml"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/supervisor"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/tools/clone"
)

// Kit works in one namespace of a cluster. It may be used concurrently.
type Kit struct {
	Cluster   *cluster.Cluster
	Client    kubernetes.Interface
	Dynamic   dynamic.Interface
	Config    *rest.Config
	Namespace string
}

// New connects to a cluster as its administrator.
func New(c *cluster.Cluster, namespace string) (*Kit, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, fmt.Errorf("read the administrator's kubeconfig: %w", err)
	}
	// The API server is reachable from inside the cluster's network only.
	cfg.Dial = c.Hub().Dial
	cfg.QPS, cfg.Burst = 100, 200
	return newKit(c, cfg, namespace)
}

func newKit(c *cluster.Cluster, cfg *rest.Config, namespace string) (*Kit, error) {
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	dyn, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	return &Kit{Cluster: c, Client: client, Dynamic: dyn, Config: cfg, Namespace: namespace}, nil
}

// As returns a kit that acts as another user.
func (k *Kit) As(user string, groups ...string) (*Kit, error) {
	cfg := rest.CopyConfig(k.Config)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
	return newKit(k.Cluster, cfg, k.Namespace)
}

// In returns a kit for another namespace, which is created if need be and usable
// when it returns: its default service account exists.
func (k *Kit) In(ctx context.Context, namespace string) (*Kit, error) {
	ns := &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := k.Client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("create namespace %s: %w", namespace, err)
	}
	other := *k
	other.Namespace = namespace
	accounts := k.Client.CoreV1().ServiceAccounts(namespace)
	_, err := watchtools.UntilWithSync(ctx, lister{
		list:  func(o metav1.ListOptions) (object, error) { return accounts.List(ctx, o) },
		watch: func(o metav1.ListOptions) (watch.Interface, error) { return accounts.Watch(ctx, o) },
	}.named("default"), &v1.ServiceAccount{}, nil, func(e watch.Event) (bool, error) { return e.Type == watch.Added, nil })
	if err != nil {
		return nil, fmt.Errorf("wait for the default service account of namespace %s: %w", namespace, err)
	}
	return &other, nil
}

var podResource = v1.SchemeGroupVersion.WithResource("pods")

// Create makes pods from YAML documents.
func (k *Kit) Create(ctx context.Context, text string) error {
	for doc := range strings.SplitSeq(text, "\n---") {
		u := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(doc), &u.Object); err != nil {
			return fmt.Errorf("parse pod: %w", err)
		}
		if len(u.Object) == 0 {
			continue
		}
		if _, err := k.Dynamic.Resource(podResource).Namespace(k.Namespace).Create(ctx, u, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create pod %s: %w", u.GetName(), err)
		}
	}
	return nil
}

// Pod reads a pod.
func (k *Kit) Pod(ctx context.Context, name string) (*v1.Pod, error) {
	return k.Client.CoreV1().Pods(k.Namespace).Get(ctx, name, metav1.GetOptions{})
}

// WaitPod waits until a pod is as the function wants it. An error of the function
// ends the wait. A pod that goes away ends it, too.
func (k *Kit) WaitPod(ctx context.Context, name, what string, is func(*v1.Pod) (bool, error)) (*v1.Pod, error) {
	pods := k.Client.CoreV1().Pods(k.Namespace)
	var last *v1.Pod
	_, err := watchtools.UntilWithSync(ctx, lister{
		list:  func(o metav1.ListOptions) (object, error) { return pods.List(ctx, o) },
		watch: func(o metav1.ListOptions) (watch.Interface, error) { return pods.Watch(ctx, o) },
	}.named(name), &v1.Pod{}, nil, func(e watch.Event) (bool, error) {
		p, ok := e.Object.(*v1.Pod)
		if !ok {
			return false, apierrors.FromObject(e.Object)
		}
		last = p
		if e.Type == watch.Deleted {
			return false, errors.New("the pod is gone")
		}
		return is(p)
	})
	if err != nil {
		return last, fmt.Errorf("wait for pod %s to be %s: %w%s", name, what, err, k.explain(ctx, last))
	}
	return last, nil
}

// explain is what the API server knows about a pod that did not become what it should.
func (k *Kit) explain(ctx context.Context, p *v1.Pod) string {
	if p == nil {
		return " (it never existed)"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n  phase %s %s %s", p.Status.Phase, p.Status.Reason, p.Status.Message)
	for _, c := range p.Status.Conditions {
		fmt.Fprintf(&b, "\n  condition %s %s %s %s", c.Type, c.Status, c.Reason, c.Message)
	}
	for _, c := range p.Status.ContainerStatuses {
		fmt.Fprintf(&b, "\n  container %s: %s", c.Name, c.State.String())
	}
	for _, e := range k.Events(context.WithoutCancel(ctx), p.Name) {
		fmt.Fprintf(&b, "\n  event %s %s", e.Reason, e.Message)
	}
	return b.String()
}

// WaitRunning waits until every container of a pod runs and the pod is ready.
func (k *Kit) WaitRunning(ctx context.Context, name string) (*v1.Pod, error) {
	return k.WaitPod(ctx, name, "ready", func(p *v1.Pod) (bool, error) {
		if p.Status.Phase == v1.PodFailed {
			return false, fmt.Errorf("the pod has failed: %s: %s", p.Status.Reason, p.Status.Message)
		}
		c := Condition(p, string(v1.PodReady))
		return c != nil && c.Status == v1.ConditionTrue, nil
	})
}

// Condition returns a condition of a pod, nil if it has none of the type.
func Condition(p *v1.Pod, kind string) *v1.PodCondition {
	for i := range p.Status.Conditions {
		if string(p.Status.Conditions[i].Type) == kind {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

// Events returns the events of a pod, oldest first.
func (k *Kit) Events(ctx context.Context, pod string) []v1.Event {
	l, err := k.Client.CoreV1().Events(k.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("involvedObject.name", pod).String(),
	})
	if err != nil {
		return nil
	}
	return l.Items
}

// Clone creates the pod that takes over source; see clone.Options.
func (k *Kit) Clone(ctx context.Context, source string, o clone.Options, change ...func(*unstructured.Unstructured)) error {
	pods := k.Dynamic.Resource(podResource).Namespace(k.Namespace)
	u, err := pods.Get(ctx, source, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read pod %s: %w", source, err)
	}
	c, err := clone.Of(u, o)
	if err != nil {
		return err
	}
	for _, f := range change {
		f(c)
	}
	if _, err := pods.Create(ctx, c, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create pod %s: %w", o.Name, err)
	}
	return nil
}

// ErrNotCloned is wrapped by the error of a clone that did not take over.
var ErrNotCloned = errors.New("the clone did not take over")

// WaitCloned waits for the end of a migration: the clone, or ErrNotCloned with the
// reason and the sentence of its condition.
func (k *Kit) WaitCloned(ctx context.Context, name string) (*v1.Pod, error) {
	return k.WaitPod(ctx, name, "cloned", func(p *v1.Pod) (bool, error) {
		c := Condition(p, v1alpha1.ConditionCloned)
		switch {
		case c == nil || c.Status == v1.ConditionUnknown:
			return false, nil
		case c.Status == v1.ConditionFalse:
			return false, fmt.Errorf("%w: %s: %s", ErrNotCloned, c.Reason, c.Message)
		}
		return true, nil
	})
}

// Move clones a pod, waits until the clone has taken over and until the source says
// so, and returns the clone.
func (k *Kit) Move(ctx context.Context, source string, o clone.Options) (*v1.Pod, error) {
	if err := k.Clone(ctx, source, o); err != nil {
		return nil, err
	}
	p, err := k.WaitCloned(ctx, o.Name)
	if err != nil {
		return p, err
	}
	_, err = k.WaitPod(ctx, source, "migrated", func(s *v1.Pod) (bool, error) {
		return s.Status.Phase == v1.PodFailed && s.Status.Reason == v1alpha1.ReasonMigrated, nil
	})
	return p, err
}

// Delete removes a pod and waits until it is gone.
func (k *Kit) Delete(ctx context.Context, name string) error {
	pods := k.Client.CoreV1().Pods(k.Namespace)
	p, err := pods.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	grace := int64(1)
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete pod %s: %w", name, err)
	}
	for {
		gone, err := k.seeGone(ctx, p)
		if gone || err != nil {
			return err
		}
		// The API server ends a watch when it likes.
		now, err := pods.Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err), err == nil && now.UID != p.UID:
			return nil
		case err != nil:
			return fmt.Errorf("wait for pod %s to go: %w", name, err)
		}
		p = now
	}
}

// seeGone watches a pod until it is gone or the watch ends.
func (k *Kit) seeGone(ctx context.Context, p *v1.Pod) (bool, error) {
	w, err := k.Client.CoreV1().Pods(p.Namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", p.Name).String(), ResourceVersion: p.ResourceVersion,
	})
	if err != nil {
		return false, fmt.Errorf("watch pod %s: %w", p.Name, err)
	}
	defer w.Stop()
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok || e.Type == watch.Deleted {
				return ok, nil
			}
		case <-ctx.Done():
			return false, fmt.Errorf("wait for pod %s to go: %w", p.Name, ctx.Err())
		}
	}
}

// Exec runs a command in the first container of a pod and returns what it printed.
func (k *Kit) Exec(ctx context.Context, pod string, command ...string) (string, error) {
	return k.Kubectl(ctx, append([]string{"exec", pod, "--"}, command...)...)
}

// Kubectl runs kubectl in the kit's namespace.
func (k *Kit) Kubectl(ctx context.Context, args ...string) (string, error) {
	var out, errs bytes.Buffer
	err := k.Cluster.Kubectl(ctx, supervisor.Command{
		Args: append([]string{"-n", k.Namespace}, args...), Stdout: &out, Stderr: &errs,
	})
	if err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Logs returns the log of a container.
func (k *Kit) Logs(ctx context.Context, pod, container string) (string, error) {
	b, err := k.Client.CoreV1().Pods(k.Namespace).GetLogs(pod, &v1.PodLogOptions{Container: container}).DoRaw(ctx)
	return string(b), err
}
