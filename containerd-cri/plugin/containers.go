package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	corecontainers "github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	securejoin "github.com/cyphar/filepath-securejoin"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
	"podmig.dev/podmig/containerd-cri/runtime/runc"
	"podmig.dev/podmig/containerd-cri/service"
)

// containers implements service.Containers over the CRI service of this process.
type containers struct {
	client *containerd.Client
	cri    cri.RuntimeServiceServer
	// initialized tells whether the CRI service knows its containers yet.
	initialized func() bool
}

var _ service.Containers = (*containers)(nil)

// ociRoot is where the shim lets runc keep its state unless it is configured.
const ociRoot = "/run/containerd/runc/" + namespace

// criInfo is the part of the CRI's verbose container information that is needed.
type criInfo struct {
	SandboxID   string `json:"sandboxID"`
	Pid         int    `json:"pid"`
	SnapshotKey string `json:"snapshotKey"`
	Snapshotter string `json:"snapshotter"`
	Config      struct {
		TTY  bool `json:"tty"`
		Envs []struct {
			Key string `json:"key"`
		} `json:"envs"`
	} `json:"config"`
}

// Get implements service.Containers.
func (c *containers) Get(ctx context.Context, id string) (service.Container, error) {
	var out service.Container
	if !c.initialized() {
		return out, fmt.Errorf("the CRI service has not started yet: %w", errdefs.ErrUnavailable)
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	res, err := c.cri.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return out, err
	}
	var info criInfo
	if err := json.Unmarshal([]byte(res.Info["info"]), &info); err != nil {
		return out, fmt.Errorf("information about the container: %w", err)
	}
	st := res.GetStatus()
	// The CRI accepts short IDs; everything below needs the whole one.
	id = st.GetId()
	container, err := c.client.LoadContainer(ctx, id)
	if err != nil {
		return out, err
	}
	spec, err := container.Spec(ctx)
	if err != nil {
		return out, fmt.Errorf("spec of the container: %w", err)
	}
	meta, err := container.Info(ctx)
	if err != nil {
		return out, err
	}
	out = service.Container{
		Container: runtime.Container{
			ID: id, Name: st.GetMetadata().GetName(), Pid: info.Pid, OCIRoot: ociRoot, OCIBinary: "runc",
		},
		SandboxID: info.SandboxID,
		ImageID:   st.GetImageId(),
		StartedAt: time.Unix(0, st.GetStartedAt()),
		LogPath:   st.GetLogPath(),
		TTY:       info.Config.TTY,
		Runtime:   meta.Runtime.Name,
	}
	switch st.GetState() {
	case cri.ContainerState_CONTAINER_CREATED:
		out.State = service.StateCreated
	case cri.ContainerState_CONTAINER_RUNNING:
		out.State = service.StateRunning
	case cri.ContainerState_CONTAINER_EXITED:
		out.State = service.StateExited
	}
	if spec.Process != nil {
		out.Args = spec.Process.Args
		out.Process = process(spec.Process, info)
	}
	if out.Confinement, err = confinement(spec); err != nil {
		return out, err
	}
	if opts, err := typeurl.UnmarshalAny(meta.Runtime.Options); err == nil {
		if o, ok := opts.(*runcoptions.Options); ok {
			if o.Root != "" {
				out.OCIRoot = filepath.Join(o.Root, namespace)
			}
			if o.BinaryName != "" {
				out.OCIBinary = o.BinaryName
			}
		}
	}
	out.HostPID = true
	if spec.Linux != nil {
		for _, ns := range spec.Linux.Namespaces {
			if ns.Type == specs.PIDNamespace {
				out.HostPID = ns.Path != ""
			}
			if ns.Type == specs.UTSNamespace && ns.Path != "" && out.State == service.StateCreated {
				if out.HostName, out.DomainName, err = runc.HostName(ns.Path); err != nil {
					return out, err
				}
			}
		}
		for _, d := range spec.Linux.Devices {
			out.Devices = append(out.Devices, d.Path)
		}
	}
	for _, m := range spec.Mounts {
		if m.Type != "bind" {
			continue
		}
		if m.Destination == "/dev/shm" {
			if m.Source != "/dev/shm" {
				out.ShmDir = m.Source
			}
			continue
		}
		out.Mounts = append(out.Mounts, runtime.Mount{Destination: m.Destination, Source: m.Source, ReadOnly: hasOption(m.Options, "ro")})
	}
	mounts, err := c.rootMounts(ctx, info)
	if err != nil {
		return out, err
	}
	out.UpperDir = upperDir(mounts)
	if out.State == service.StateCreated {
		err = resolveMounts(ctx, mounts, &out.Confinement)
	}
	return out, err
}

// process describes the first process of a container. The CRI service gives every
// container its pod's host name in a variable; that is none of the process's identity
// unless the caller has set it.
func process(p *specs.Process, info criInfo) checkpoint.Process {
	out := checkpoint.Process{Cwd: p.Cwd, UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids}
	named := false
	for _, e := range info.Config.Envs {
		named = named || e.Key == hostnameVariable
	}
	for _, e := range p.Env {
		if named || !strings.HasPrefix(e, hostnameVariable+"=") {
			out.Env = append(out.Env, e)
		}
	}
	return out
}

const hostnameVariable = "HOSTNAME"

func hasOption(options []string, want string) bool {
	for _, o := range options {
		if o == want {
			return true
		}
	}
	return false
}

// rootMounts are the mounts of the container's root file system, none when its
// snapshot is gone.
func (c *containers) rootMounts(ctx context.Context, info criInfo) ([]mount.Mount, error) {
	mounts, err := c.client.SnapshotService(info.Snapshotter).Mounts(ctx, info.SnapshotKey)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("writable layer of the container: %w", err)
	}
	return mounts, nil
}

// resolveMounts replaces the destinations of mounts by where they are found in the
// container: runc follows the links of the image (/var/run is one in most), and the
// checkpoint names what runc has found.
func resolveMounts(ctx context.Context, mounts []mount.Mount, c *criu.Confinement) error {
	if len(mounts) == 0 {
		return nil
	}
	return mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		resolved := make(map[string]criu.Mount, len(c.Mounts))
		for destination, m := range c.Mounts {
			p, err := securejoin.SecureJoin(root, destination)
			if err != nil {
				return fmt.Errorf("find mount %s in the image: %w", destination, err)
			}
			resolved[filepath.Clean("/"+strings.TrimPrefix(p, root))] = m
		}
		c.Mounts = resolved
		return nil
	})
}

// upperDir returns the directory of the writable layer, empty when the snapshotter
// has none.
func upperDir(mounts []mount.Mount) string {
	for _, m := range mounts {
		for _, o := range m.Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok && m.Type == "overlay" {
				return dir
			}
		}
	}
	return ""
}

// criuConfig is the annotation through which runc takes a CRIU configuration file.
const criuConfig = "org.criu.config"

// Start implements service.Containers.
func (c *containers) Start(ctx context.Context, id string, r service.Restore) error {
	if !patched {
		return fmt.Errorf("this containerd was built without the migration hooks: %w", errdefs.ErrFailedPrecondition)
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	container, err := c.client.LoadContainer(ctx, id)
	if err != nil {
		return err
	}
	if err := container.Update(ctx, annotate(criuConfig, r.Config)); err != nil {
		return fmt.Errorf("prepare the container: %w", err)
	}
	_, err = c.cri.StartContainer(startFrom(ctx, id, r), &cri.StartContainerRequest{ContainerId: id})
	if err == nil {
		return nil
	}
	if lines := runc.LogErrors(filepath.Join(r.Work, "restore.log")); lines != "" {
		err = fmt.Errorf("%w; criu: %s", err, lines)
	}
	// The CRI service deletes the task after a failed start, but gives up when its
	// shim does not answer. What counts is that no process exists.
	return errors.Join(err, c.Clean(context.WithoutCancel(ctx), id, r.Work))
}

// Clean implements service.Containers.
func (c *containers) Clean(ctx context.Context, id, work string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	root := ociRoot
	known, err := c.Get(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return err
	case known.State != service.StateCreated && known.State != service.StateExited:
		// It runs, or may run.
		return nil
	default:
		root = known.OCIRoot
	}
	return runc.RemoveRestore(ctx, root, id, filepath.Join(work, "restore.log"))
}

// Abandon implements service.Containers.
func (c *containers) Abandon(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return runc.KillAll(ctx, id)
}

func annotate(key, value string) containerd.UpdateContainerOpts {
	return func(_ context.Context, _ *containerd.Client, c *corecontainers.Container) error {
		var spec specs.Spec
		if c.Spec == nil {
			return errors.New("the container has no spec")
		}
		if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
			return err
		}
		if spec.Annotations == nil {
			spec.Annotations = map[string]string{}
		}
		spec.Annotations[key] = value
		var err error
		c.Spec, err = typeurl.MarshalAny(&spec)
		return err
	}
}

// confinement reads from a spec what processes of the container may.
func confinement(spec *specs.Spec) (criu.Confinement, error) {
	c := criu.Confinement{Mounts: map[string]criu.Mount{}}
	if p := spec.Process; p != nil {
		c.NoNewPrivs, c.AppArmor = p.NoNewPrivileges, p.ApparmorProfile
		if p.Capabilities != nil {
			known := map[string]int{}
			for i, name := range cap.Known() {
				known[name] = i
			}
			for _, name := range p.Capabilities.Bounding {
				i, ok := known[name]
				if !ok {
					return c, fmt.Errorf("unknown capability %s", name)
				}
				c.Capabilities |= 1 << i
			}
		}
	}
	if spec.Root != nil {
		c.ReadOnlyRoot = spec.Root.Readonly
	}
	if spec.Linux != nil {
		c.Seccomp = spec.Linux.Seccomp != nil
		c.ReadOnly, c.Masked = spec.Linux.ReadonlyPaths, spec.Linux.MaskedPaths
	}
	for _, m := range spec.Mounts {
		c.Mounts[filepath.Clean(m.Destination)] = criu.Mount{Type: m.Type, ReadOnly: hasOption(m.Options, "ro")}
	}
	return c, nil
}
