// Package compare decides from two pod objects whether the second can take over
// the processes of the first, and says in words what stands in the way.
//
// It is the part of the preflight that needs nothing but the API objects, so both
// kubelets run it: the target before it asks, the source before it believes. It
// sees what users wrote; what processes do with it (open devices, io_uring, files
// below a hostPath) is the runtime's preflight. Pure.
package compare

import (
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"podmig.dev/podmig/kubelet/deferral"
)

// Codes of findings. They are stable: clients and tests match on them.
const (
	CodeNotRunning     = "SourceNotRunning"
	CodeTerminating    = "SourceTerminating"
	CodeContainers     = "ContainersDiffer"
	CodeImage          = "ImageDiffers"
	CodeProcess        = "ProcessDiffers"
	CodeVolumes        = "VolumesDiffer"
	CodeSecurity       = "SecurityContextDiffers"
	CodeServiceAccount = "ServiceAccountDiffers"
	CodeHostNamespace  = "HostNamespace"
	CodeSharedPID      = "SharedProcessNamespace"
	CodeHostPath       = "HostPathVolume"
	CodeVolumeKind     = "VolumeKind"
	CodeDevice         = "Device"
	CodeEphemeral      = "EphemeralContainer"
	CodeTerminal       = "Terminal"
	CodeMemory         = "MemoryLimit"
)

// Finding is one reason why a pod cannot be moved into another.
type Finding struct {
	Code string
	// Container is empty for findings about the whole pod.
	Container string
	// Message says what is wrong, Cure what the user can do about it.
	Message string
	Cure    string
}

func (f Finding) String() string { return f.Message + "; " + f.Cure }

// Pods returns why clone cannot take over the processes of source, nothing when
// the objects allow it. The time tells whether a source that is being deleted still waits.
func Pods(source, clone *v1.Pod, now time.Time) []Finding {
	var fs []Finding
	fs = append(fs, running(source, now)...)
	fs = append(fs, Movable(source)...)
	fs = append(fs, podDiffers(source, clone)...)
	fs = append(fs, containersDiffer(source, clone)...)
	fs = append(fs, volumesDiffer(source, clone)...)
	return fs
}

// Moving returns the containers of a pod whose processes move: the regular ones
// and the restartable init containers, in the order of the pod. Init containers
// that ran to their end stay behind.
func Moving(spec *v1.PodSpec) []v1.Container {
	var cs []v1.Container
	for _, c := range spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways {
			cs = append(cs, c)
		}
	}
	return append(cs, spec.Containers...)
}

// running finds what keeps the source from being a complete running pod.
func running(source *v1.Pod, now time.Time) []Finding {
	if source.DeletionTimestamp != nil && !deferral.Waits(source, now) {
		return []Finding{{
			Code:    CodeTerminating,
			Message: fmt.Sprintf("source pod %q is being deleted", source.Name),
			Cure:    "clone a pod that stays until the clone has taken over",
		}}
	}
	if source.Status.Phase != v1.PodRunning {
		return []Finding{{
			Code:    CodeNotRunning,
			Message: fmt.Sprintf("source pod %q is %s, not Running", source.Name, phase(source)),
			Cure:    "wait until it runs, or create the pod without clonePod",
		}}
	}
	var fs []Finding
	statuses := slices.Concat(source.Status.InitContainerStatuses, source.Status.ContainerStatuses)
	for _, c := range Moving(&source.Spec) {
		i := slices.IndexFunc(statuses, func(s v1.ContainerStatus) bool { return s.Name == c.Name })
		if i < 0 || statuses[i].State.Running == nil {
			fs = append(fs, Finding{
				Code: CodeNotRunning, Container: c.Name,
				Message: fmt.Sprintf("container %q of source pod %q is not running", c.Name, source.Name),
				Cure:    "wait until every container of the pod runs",
			})
		}
	}
	return fs
}

func phase(p *v1.Pod) v1.PodPhase {
	if p.Status.Phase == "" {
		return v1.PodPending
	}
	return p.Status.Phase
}

// Movable returns what in the spec of a pod makes it immovable wherever it goes.
func Movable(pod *v1.Pod) []Finding {
	var fs []Finding
	spec := &pod.Spec
	if spec.HostNetwork || spec.HostPID || spec.HostIPC {
		fs = append(fs, Finding{
			Code:    CodeHostNamespace,
			Message: "the pod uses a namespace of its node (hostNetwork, hostPID or hostIPC), which stays behind",
			Cure:    "give the pod namespaces of its own",
		})
	}
	if spec.ShareProcessNamespace != nil && *spec.ShareProcessNamespace {
		fs = append(fs, Finding{
			Code:    CodeSharedPID,
			Message: "the containers share one process namespace, whose process IDs are taken on the target",
			Cure:    "set shareProcessNamespace to false",
		})
	}
	for _, c := range Moving(spec) {
		if c.TTY {
			fs = append(fs, Finding{
				Code: CodeTerminal, Container: c.Name,
				Message: fmt.Sprintf("container %q has a terminal, whose other end stays on the source node", c.Name),
				Cure:    "set tty to false",
			})
		}
		for name := range c.Resources.Limits {
			if isDevice(name) {
				fs = append(fs, Finding{
					Code: CodeDevice, Container: c.Name,
					Message: fmt.Sprintf("container %q uses %s, a device whose state cannot be read", c.Name, name),
					Cure:    "run the part that needs the device in a pod that need not move",
				})
			}
		}
		if len(c.Resources.Claims) > 0 || len(c.VolumeDevices) > 0 {
			fs = append(fs, Finding{
				Code: CodeDevice, Container: c.Name,
				Message: fmt.Sprintf("container %q uses a device through a resource claim or a block volume, whose state cannot be read", c.Name),
				Cure:    "run the part that needs the device in a pod that need not move",
			})
		}
	}
	for _, s := range pod.Status.EphemeralContainerStatuses {
		if s.State.Running != nil {
			fs = append(fs, Finding{
				Code: CodeEphemeral, Container: s.Name,
				Message: fmt.Sprintf("ephemeral container %q is running and is no part of the clone", s.Name),
				Cure:    "end the debugging session first",
			})
		}
	}
	for i := range spec.Volumes {
		if f := volumeMovable(&spec.Volumes[i]); f != nil {
			fs = append(fs, *f)
		}
	}
	return fs
}

// isDevice tells extended resources (DOMAIN/NAME outside kubernetes.io) from the
// ones that every node has.
func isDevice(name v1.ResourceName) bool {
	domain := false
	for i, r := range name {
		if r == '/' {
			domain = string(name[:i]) != "kubernetes.io"
			break
		}
	}
	return domain
}

// volumeMovable allows the kinds whose content the target kubelet makes itself or
// that travel with the pod.
func volumeMovable(v *v1.Volume) *Finding {
	switch {
	case v.EmptyDir != nil, v.ConfigMap != nil, v.Secret != nil, v.Projected != nil, v.DownwardAPI != nil, v.Image != nil:
		return nil
	case v.HostPath != nil:
		return &Finding{
			Code:    CodeHostPath,
			Message: fmt.Sprintf("volume %q is the path %s of the source node, which does not move", v.Name, v.HostPath.Path),
			Cure:    "use an emptyDir volume, which moves with the pod",
		}
	}
	return &Finding{
		Code:    CodeVolumeKind,
		Message: fmt.Sprintf("volume %q cannot be attached to both nodes while the pod moves", v.Name),
		Cure:    "keep the data in an emptyDir volume, or move the pod by deleting and recreating it",
	}
}

func podDiffers(source, clone *v1.Pod) []Finding {
	var fs []Finding
	if source.Spec.ServiceAccountName != clone.Spec.ServiceAccountName {
		fs = append(fs, Finding{
			Code:    CodeServiceAccount,
			Message: fmt.Sprintf("the source runs as service account %q and the clone as %q", source.Spec.ServiceAccountName, clone.Spec.ServiceAccountName),
			Cure:    "give the clone the service account of the source",
		})
	}
	if !equality.Semantic.DeepEqual(source.Spec.SecurityContext, clone.Spec.SecurityContext) ||
		!equality.Semantic.DeepEqual(source.Spec.RuntimeClassName, clone.Spec.RuntimeClassName) ||
		!equality.Semantic.DeepEqual(source.Spec.HostUsers, clone.Spec.HostUsers) ||
		source.Spec.HostNetwork != clone.Spec.HostNetwork || source.Spec.HostPID != clone.Spec.HostPID || source.Spec.HostIPC != clone.Spec.HostIPC {
		fs = append(fs, Finding{
			Code:    CodeSecurity,
			Message: "the security context of the pod, its runtime class or its use of the node's namespaces differ from the source's",
			Cure:    "copy securityContext, runtimeClassName, hostUsers, hostNetwork, hostPID and hostIPC from the source",
		})
	}
	return fs
}

func containersDiffer(source, clone *v1.Pod) []Finding {
	var fs []Finding
	have := Moving(&clone.Spec)
	for _, s := range Moving(&source.Spec) {
		i := slices.IndexFunc(have, func(c v1.Container) bool { return c.Name == s.Name })
		if i < 0 {
			fs = append(fs, Finding{
				Code: CodeContainers, Container: s.Name,
				Message: fmt.Sprintf("container %q of the source is missing in the clone", s.Name),
				Cure:    "give the clone exactly the containers of the source",
			})
			continue
		}
		fs = append(fs, containerDiffers(&s, &have[i])...)
		have = slices.Delete(have, i, i+1)
	}
	for _, c := range have {
		fs = append(fs, Finding{
			Code: CodeContainers, Container: c.Name,
			Message: fmt.Sprintf("container %q of the clone does not exist in the source", c.Name),
			Cure:    "give the clone exactly the containers of the source",
		})
	}
	return fs
}

func containerDiffers(s, c *v1.Container) []Finding {
	var fs []Finding
	add := func(code, message, cure string) {
		fs = append(fs, Finding{Code: code, Container: s.Name, Message: message, Cure: cure})
	}
	if s.Image != c.Image {
		add(CodeImage, fmt.Sprintf("container %q runs image %q in the source and %q in the clone", s.Name, s.Image, c.Image),
			"give the clone the image of the source: its processes go on with the files of that image")
	}
	if !slices.Equal(s.Command, c.Command) || !slices.Equal(s.Args, c.Args) || s.WorkingDir != c.WorkingDir ||
		s.Stdin != c.Stdin || s.TTY != c.TTY {
		add(CodeProcess, fmt.Sprintf("command, args, workingDir, stdin or tty of container %q differ, but its processes go on as they are", s.Name),
			"copy them from the source, or create the pod without clonePod")
	}
	if !equality.Semantic.DeepEqual(s.SecurityContext, c.SecurityContext) {
		add(CodeSecurity, fmt.Sprintf("the security context of container %q differs from the source's", s.Name),
			"copy securityContext from the source")
	}
	if !sameMounts(s.VolumeMounts, c.VolumeMounts) {
		add(CodeVolumes, fmt.Sprintf("the volume mounts of container %q differ from the source's", s.Name),
			"mount the same volumes at the same paths: open files are found again by their paths")
	}
	was, is := s.Resources.Limits.Memory(), c.Resources.Limits.Memory()
	if !is.IsZero() && (was.IsZero() || is.Cmp(*was) < 0) {
		add(CodeMemory, fmt.Sprintf("container %q may use less memory in the clone (%s) than in the source (%s)", s.Name, is, limit(was.IsZero(), was.String())),
			"give the clone at least the memory limit of the source")
	}
	return fs
}

func limit(none bool, s string) string {
	if none {
		return "no limit"
	}
	return s
}

// automatic is the directory of the token that the API server mounts by itself;
// the name of its volume is random, so it is compared by path only.
const automatic = "/var/run/secrets/kubernetes.io/serviceaccount"

func sameMounts(a, b []v1.VolumeMount) bool {
	if len(a) != len(b) {
		return false
	}
	for _, m := range a {
		i := slices.IndexFunc(b, func(n v1.VolumeMount) bool { return n.MountPath == m.MountPath })
		if i < 0 {
			return false
		}
		n := b[i]
		if m.MountPath == automatic {
			n.Name = m.Name
		}
		if !equality.Semantic.DeepEqual(m, n) {
			return false
		}
	}
	return true
}

func volumesDiffer(source, clone *v1.Pod) []Finding {
	var fs []Finding
	differ := func(message string) {
		fs = append(fs, Finding{
			Code: CodeVolumes, Message: message,
			Cure: "give the clone the volumes of the source",
		})
	}
	ignore := func(p *v1.Pod) map[string]bool {
		names := make(map[string]bool)
		for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			for _, m := range c.VolumeMounts {
				if m.MountPath == automatic {
					names[m.Name] = true
				}
			}
		}
		return names
	}
	skipSource, skipClone := ignore(source), ignore(clone)
	var have []v1.Volume
	for _, v := range clone.Spec.Volumes {
		if !skipClone[v.Name] {
			have = append(have, v)
		}
	}
	for _, s := range source.Spec.Volumes {
		if skipSource[s.Name] {
			continue
		}
		i := slices.IndexFunc(have, func(v v1.Volume) bool { return v.Name == s.Name })
		switch {
		case i < 0:
			differ(fmt.Sprintf("volume %q of the source is missing in the clone", s.Name))
			continue
		case !equality.Semantic.DeepEqual(s.VolumeSource, have[i].VolumeSource):
			differ(fmt.Sprintf("volume %q of the clone is not the volume of the source", s.Name))
		}
		have = slices.Delete(have, i, i+1)
	}
	for _, v := range have {
		differ(fmt.Sprintf("volume %q of the clone does not exist in the source", v.Name))
	}
	return fs
}
