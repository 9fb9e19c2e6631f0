package compare

import (
	"slices"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

func source() *v1.Pod {
	always := v1.ContainerRestartPolicyAlways
	running := v1.ContainerState{Running: &v1.ContainerStateRunning{}}
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "source"},
		Spec: v1.PodSpec{
			ServiceAccountName: "default",
			InitContainers: []v1.Container{
				{Name: "setup", Image: "setup:1"},
				{Name: "proxy", Image: "proxy:1", RestartPolicy: &always},
			},
			Containers: []v1.Container{{
				Name: "main", Image: "redis:7",
				Resources: v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceMemory: resource.MustParse("1Gi")}},
				VolumeMounts: []v1.VolumeMount{
					{Name: "data", MountPath: "/data"},
					{Name: "kube-api-access-aaaaa", MountPath: automatic, ReadOnly: true},
				},
			}},
			Volumes: []v1.Volume{
				{Name: "data", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}},
				{Name: "kube-api-access-aaaaa", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{}}},
			},
		},
		Status: v1.PodStatus{
			Phase:                 v1.PodRunning,
			InitContainerStatuses: []v1.ContainerStatus{{Name: "setup"}, {Name: "proxy", State: running}},
			ContainerStatuses:     []v1.ContainerStatus{{Name: "main", State: running}},
		},
	}
}

// clone is what a careful user writes: the source's spec with a token volume of
// its own.
func clone() *v1.Pod {
	c := source()
	c.Name = "clone"
	c.Status = v1.PodStatus{Phase: v1.PodPending}
	c.Spec.Volumes[1].Name = "kube-api-access-bbbbb"
	c.Spec.Containers[0].VolumeMounts[1].Name = "kube-api-access-bbbbb"
	return c
}

var now = time.Unix(1e9, 0)

func TestPods(t *testing.T) {
	tests := []struct {
		name   string
		change func(source, clone *v1.Pod)
		codes  []string
	}{
		{name: "a proper clone", change: func(s, c *v1.Pod) {}},
		{name: "other labels, tolerations, environment", change: func(s, c *v1.Pod) {
			c.Labels = map[string]string{"a": "b"}
			c.Spec.Tolerations = []v1.Toleration{{Key: "x"}}
			c.Spec.Containers[0].Env = []v1.EnvVar{{Name: "A", Value: "B"}}
		}},
		{name: "init container that ran to its end may differ", change: func(s, c *v1.Pod) { c.Spec.InitContainers[0].Image = "setup:2" }},
		{name: "deleted", change: func(s, c *v1.Pod) { s.DeletionTimestamp = &metav1.Time{} }, codes: []string{CodeTerminating}},
		{name: "deleted, and waits to be moved", change: func(s, c *v1.Pod) {
			s.DeletionTimestamp, s.Finalizers = &metav1.Time{Time: now}, []string{v1alpha1.FinalizerMigrate}
		}},
		{name: "deleted, and has waited long enough", change: func(s, c *v1.Pod) {
			s.DeletionTimestamp, s.Finalizers = &metav1.Time{Time: now.Add(-time.Hour)}, []string{v1alpha1.FinalizerMigrate}
		}, codes: []string{CodeTerminating}},
		{name: "pending", change: func(s, c *v1.Pod) { s.Status.Phase = v1.PodPending }, codes: []string{CodeNotRunning}},
		{name: "one container waits", change: func(s, c *v1.Pod) { s.Status.ContainerStatuses[0].State = v1.ContainerState{} }, codes: []string{CodeNotRunning}},
		{name: "sidecar is down", change: func(s, c *v1.Pod) { s.Status.InitContainerStatuses[1].State = v1.ContainerState{} }, codes: []string{CodeNotRunning}},
		{name: "image", change: func(s, c *v1.Pod) { c.Spec.Containers[0].Image = "redis:8" }, codes: []string{CodeImage}},
		{name: "renamed container", change: func(s, c *v1.Pod) { c.Spec.Containers[0].Name = "other" }, codes: []string{CodeContainers, CodeContainers}},
		{name: "sidecar missing", change: func(s, c *v1.Pod) { c.Spec.InitContainers = c.Spec.InitContainers[:1] }, codes: []string{CodeContainers}},
		{name: "command", change: func(s, c *v1.Pod) { c.Spec.Containers[0].Command = []string{"x"} }, codes: []string{CodeProcess}},
		{name: "mount elsewhere", change: func(s, c *v1.Pod) { c.Spec.Containers[0].VolumeMounts[0].MountPath = "/else" }, codes: []string{CodeVolumes}},
		{name: "volume of another kind", change: func(s, c *v1.Pod) {
			c.Spec.Volumes[0].VolumeSource = v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{}}
		}, codes: []string{CodeVolumes}},
		{name: "one volume more", change: func(s, c *v1.Pod) {
			c.Spec.Volumes = append(c.Spec.Volumes, v1.Volume{Name: "new"})
		}, codes: []string{CodeVolumes}},
		{name: "token volume that the API server did not add", change: func(s, c *v1.Pod) {
			c.Spec.Containers[0].VolumeMounts = c.Spec.Containers[0].VolumeMounts[:1]
			c.Spec.Volumes = c.Spec.Volumes[:1]
		}, codes: []string{CodeVolumes}},
		{name: "less memory", change: func(s, c *v1.Pod) {
			c.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceMemory: resource.MustParse("512Mi")}
		}, codes: []string{CodeMemory}},
		{name: "more memory", change: func(s, c *v1.Pod) {
			c.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceMemory: resource.MustParse("2Gi")}
		}},
		{name: "service account", change: func(s, c *v1.Pod) { c.Spec.ServiceAccountName = "admin" }, codes: []string{CodeServiceAccount}},
		{name: "privileged", change: func(s, c *v1.Pod) {
			yes := true
			c.Spec.Containers[0].SecurityContext = &v1.SecurityContext{Privileged: &yes}
		}, codes: []string{CodeSecurity}},
		{name: "runtime class", change: func(s, c *v1.Pod) {
			other := "other"
			c.Spec.RuntimeClassName = &other
		}, codes: []string{CodeSecurity}},
		{name: "user namespace of the node", change: func(s, c *v1.Pod) {
			no := false
			s.Spec.HostUsers = &no
		}, codes: []string{CodeSecurity}},
		{name: "host network on both", change: func(s, c *v1.Pod) { s.Spec.HostNetwork, c.Spec.HostNetwork = true, true }, codes: []string{CodeHostNamespace}},
		{name: "shared process namespace", change: func(s, c *v1.Pod) {
			yes := true
			s.Spec.ShareProcessNamespace, c.Spec.ShareProcessNamespace = &yes, &yes
		}, codes: []string{CodeSharedPID}},
		{name: "hostPath on both", change: func(s, c *v1.Pod) {
			hp := v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: "/srv"}}
			s.Spec.Volumes[0].VolumeSource, c.Spec.Volumes[0].VolumeSource = hp, hp
		}, codes: []string{CodeHostPath}},
		{name: "persistent volume", change: func(s, c *v1.Pod) {
			pv := v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "x"}}
			s.Spec.Volumes[0].VolumeSource, c.Spec.Volumes[0].VolumeSource = pv, pv
		}, codes: []string{CodeVolumeKind}},
		{name: "device", change: func(s, c *v1.Pod) {
			s.Spec.Containers[0].Resources.Limits["nvidia.com/gpu"] = resource.MustParse("1")
			c.Spec.Containers[0].Resources.Limits["nvidia.com/gpu"] = resource.MustParse("1")
		}, codes: []string{CodeDevice}},
		{name: "terminal", change: func(s, c *v1.Pod) { s.Spec.Containers[0].TTY, c.Spec.Containers[0].TTY = true, true }, codes: []string{CodeTerminal}},
		{name: "debugger attached", change: func(s, c *v1.Pod) {
			s.Status.EphemeralContainerStatuses = []v1.ContainerStatus{{Name: "debug", State: v1.ContainerState{Running: &v1.ContainerStateRunning{}}}}
		}, codes: []string{CodeEphemeral}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, c := source(), clone()
			tt.change(s, c)
			var codes []string
			for _, f := range Pods(s, c, now) {
				codes = append(codes, f.Code)
				if f.Message == "" || f.Cure == "" {
					t.Errorf("%s has no message or no cure: %+v", f.Code, f)
				}
			}
			if !slices.Equal(codes, tt.codes) {
				t.Errorf("got %q, want %q", codes, tt.codes)
			}
		})
	}
}
