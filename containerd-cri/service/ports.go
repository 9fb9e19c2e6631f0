package service

import (
	"context"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
)

// State is the CRI state of a container.
type State int

const (
	StateUnknown State = iota
	StateCreated
	StateRunning
	StateExited
)

func (s State) String() string {
	return [...]string{"unknown", "created", "running", "exited"}[s]
}

// Container is a container of the CRI service.
type Container struct {
	runtime.Container
	SandboxID string
	State     State
	// ImageID is the digest of the image configuration.
	ImageID   string
	StartedAt time.Time
	// LogPath is the file of the container's log, empty when it has none.
	LogPath string
	// UpperDir is the directory of the writable layer.
	UpperDir string
	// ShmDir is the pod's /dev/shm on the node, empty when it is the node's own.
	ShmDir string
	TTY    bool
	Args   []string
	// Process is what else describes the first process.
	Process checkpoint.Process
	// Runtime is the name of the shim.
	Runtime string
	// HostPID is set when the container has no PID namespace of its own.
	HostPID bool
	// HostName and DomainName are the pod's, of a created container with the UTS
	// namespace of its pod. Others have no HostName.
	HostName, DomainName string
	// Confinement is what the processes of the container may.
	Confinement criu.Confinement
	// Devices are the device nodes the container was given beyond the usual ones.
	Devices []string
}

// Restore says from what a created container is started.
type Restore struct {
	// Images is the directory of the CRIU images, Work takes CRIU's log.
	Images string
	Work   string
	// Config is a CRIU configuration file.
	Config string
	// StartedAt is what the container reports as its start.
	StartedAt time.Time
}

// Containers is the CRI service.
type Containers interface {
	// Get describes a container; the error wraps errdefs.ErrNotFound when there is
	// none.
	Get(ctx context.Context, id string) (Container, error)
	// Start starts a created container from a checkpoint. Afterwards it is running
	// like any other, or the error tells why not and none of its processes exists.
	Start(ctx context.Context, id string, r Restore) error
	// Abandon ends every process of a restore that cannot come to its end by itself, so
	// that Start returns.
	Abandon(ctx context.Context, id string) error
	// Clean removes what a restore has left of a container that does not run: processes
	// and mounts. work is where CRIU's log was.
	Clean(ctx context.Context, id, work string) error
}

// Pods is what RestorePod needs of the CRI service to make a pod and to remove it.
type Pods interface {
	PodSandboxStatus(context.Context, *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error)
	RunPodSandbox(context.Context, *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error)
	StopPodSandbox(context.Context, *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error)
	RemovePodSandbox(context.Context, *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error)
	CreateContainer(context.Context, *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error)
}

// Scratch provides directories in memory.
type Scratch interface {
	// Create makes dir, which does not exist, a directory whose files are in memory
	// only and readable for root only.
	Create(dir string) error
	// Remove removes dir with all files. It succeeds when there is none.
	Remove(dir string) error
}
