package service

import (
	"context"
	"fmt"
	"strings"

	"podmig.dev/podmig/containerd-cri/checkpoint/tree"
	"podmig.dev/podmig/containerd-cri/runtime"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// PreflightPod implements migration.MigrationServiceServer.
func (s *Service) PreflightPod(ctx context.Context, r *migration.PreflightPodRequest) (*migration.PreflightPodResponse, error) {
	if err := checkOptions(r.Options); err != nil {
		return nil, err
	}
	names := map[string]string{}
	for _, id := range r.ContainerIds {
		names[id] = id
	}
	cs, err := s.containers(ctx, r.PodSandboxId, names, len(r.ContainerIds), StateRunning)
	if err != nil {
		return nil, err
	}
	findings, memory, err := s.inspect(ctx, cs)
	if err != nil {
		return nil, err
	}
	out := &migration.PreflightPodResponse{MemoryBytes: memory}
	for _, c := range cs {
		if c.UpperDir != "" {
			n, err := tree.Size(ctx, c.UpperDir)
			if err != nil {
				return nil, toStatus(err)
			}
			out.RootfsBytes += n
		}
	}
	for _, f := range findings {
		severity := migration.Finding_SEVERITY_WARNING
		if f.Blocking {
			severity = migration.Finding_SEVERITY_BLOCKING
		}
		out.Findings = append(out.Findings, &migration.Finding{
			Severity: severity, Code: f.Code, ContainerId: f.ContainerID, Pid: int32(f.Pid), Fd: int32(f.FD), Message: f.Message, Cure: f.Cure,
		})
	}
	return out, nil
}

// inspect finds what prevents or endangers a dump of the containers, and how much
// memory it would have.
func (s *Service) inspect(ctx context.Context, cs []Container) ([]runtime.Finding, uint64, error) {
	features, err := s.features()
	if err != nil {
		return nil, 0, toStatus(err)
	}
	var findings []runtime.Finding
	if features.CRIUVersion == "" {
		findings = append(findings, runtime.Finding{Blocking: true, Code: "NoCRIU", FD: -1,
			Message: "CRIU is not installed on this node, so no process can be dumped.", Cure: "Install CRIU 4.2.1 or later on every node."})
	}
	var rcs []runtime.Container
	for _, c := range cs {
		findings = append(findings, checkContainer(c)...)
		c.Name = ""
		rcs = append(rcs, c.Container)
	}
	report, err := s.c.Runtime.Preflight(ctx, rcs)
	if err != nil {
		return nil, 0, toStatus(fmt.Errorf("preflight: %w", err))
	}
	return append(findings, report.Findings...), report.MemoryBytes, nil
}

// runcShim is the only runtime that restores what this service writes.
const runcShim = "io.containerd.runc.v2"

// checkContainer finds what the description of a container already tells.
func checkContainer(c Container) []runtime.Finding {
	var out []runtime.Finding
	add := func(blocking bool, code, message, cure string) {
		out = append(out, runtime.Finding{Blocking: blocking, Code: code, ContainerID: c.ID, FD: -1, Message: message, Cure: cure})
	}
	if c.TTY {
		add(true, "TTY", "The container has a terminal, which belongs to this node.", "Run the container without tty.")
	}
	if c.Runtime != "" && c.Runtime != runcShim {
		add(true, "Runtime", "The container runs with "+c.Runtime+", which does not restore with CRIU and runc.", "Use a runtime class of "+runcShim+".")
	}
	if c.UpperDir == "" {
		add(true, "Snapshotter", "The writable layer of the container is not a directory of an overlay.", "Use containerd's overlayfs snapshotter for the runtime class of the pod.")
	}
	if c.HostPID {
		add(true, "SharedPIDNamespace", "The container shares a PID namespace, in which its process numbers may be taken on the target.", "Remove hostPID and shareProcessNamespace from the pod.")
	}
	for _, d := range c.Devices {
		add(true, "Device", "The container was given the device "+d+" of this node.", "Remove the device from the pod; processes that use devices can not be moved.")
	}
	for _, m := range c.Mounts {
		if strings.HasPrefix(m.Source, "/dev/") {
			add(true, "DeviceMount", fmt.Sprintf("The container has %s of this node mounted at %s.", m.Source, m.Destination), "Remove the hostPath volume or block device from the pod.")
		}
	}
	return out
}
