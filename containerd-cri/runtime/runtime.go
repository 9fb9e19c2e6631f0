// Package runtime is the port between the migration service and what really
// freezes, dumps and kills containers. It says what a runtime must guarantee; runc
// and CRIU implement it in runtime/runc, a simulation in runtime/fake.
package runtime

import (
	"context"
	"errors"
	"time"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// Container is a running container as the runtime sees it.
type Container struct {
	ID string
	// Name is the name in the pod. It names the container in the stream.
	Name string
	// Pid of the init process in the PID namespace of the node.
	Pid int
	// OCIRoot is the directory where the OCI runtime keeps its state, OCIBinary the
	// runtime itself.
	OCIRoot   string
	OCIBinary string
	// Mounts are the destinations and sources of the bind mounts of the container.
	Mounts []Mount
}

// Mount is a mount of a container that comes from the node.
type Mount struct {
	Destination string
	Source      string
	ReadOnly    bool
	// Volume is set for the volumes that move with the pod.
	Volume bool
}

// Features are what a node can do.
type Features struct {
	OCIName, OCIVersion string
	// CRIUVersion is empty when there is no CRIU.
	CRIUVersion   string
	KernelRelease string
	Architecture  string
	CPUFeatures   []string
	WriteTracking bool
	SoftDirty     bool
	LazyPages     bool
	TimeNamespace bool
	CgroupMode    string
}

// Finding is one thing that prevents or endangers a dump.
type Finding struct {
	Blocking    bool
	Code        string
	ContainerID string
	Pid         int
	FD          int
	Message     string
	Cure        string
}

// Report is what a preflight found.
type Report struct {
	Findings    []Finding
	MemoryBytes uint64
}

// Dumped is what a dump reports.
type Dumped struct {
	// Duration is the time until CRIU had finished.
	Duration time.Duration
	// MemoryBytes is the memory of the processes, Pages the pages sent for it.
	MemoryBytes uint64
	Pages       uint64
}

// Memory is the memory of one container and what was sent of it. Its methods are not
// called concurrently.
type Memory interface {
	// Round sends the pages that are not what was sent of them before, and returns how
	// many it sent. The container runs meanwhile: what it writes is found by the next
	// round. An error that is not one of the stream or the context is no reason to
	// give up: what was not sent is left to the dump.
	Round(ctx context.Context, out *checkpoint.Writer, round uint32) (pages uint64, err error)
	// Close forgets what was sent. It is called once, after everything else.
	Close()
}

// ErrGone is wrapped when the processes of a container do not exist any more.
var ErrGone = errors.New("no process of the container exists")

// Runtime freezes, dumps and kills the containers of a pod.
//
// Methods block until the work is done or the context ends, and may be called
// concurrently for different containers.
type Runtime interface {
	// Features has no side effects.
	Features(ctx context.Context) (Features, error)

	// Preflight inspects the processes of the containers without stopping them.
	Preflight(ctx context.Context, cs []Container) (Report, error)

	// Freeze stops all processes of the containers at one instant. They stay frozen
	// whatever happens to the caller, until Thaw or Kill. Freezing what is frozen
	// succeeds. After an error none of the containers is frozen.
	Freeze(ctx context.Context, cs []Container) error

	// Frozen tells whether the container is frozen now.
	Frozen(ctx context.Context, c Container) (bool, error)

	// Thaw lets frozen containers run on. Thawing what runs succeeds.
	Thaw(ctx context.Context, cs []Container) error

	// Kill ends all processes of frozen containers; none of them runs another
	// instruction. Killing what does not exist succeeds.
	Kill(ctx context.Context, cs []Container) error

	// Track returns what sends the memory of a running container ahead of its dump.
	Track(c Container) Memory

	// Dump writes the state of a frozen container to the stream as parts of kind
	// image and pages, without the pages that m has sent and that are still the same.
	// It completes the parts that m has begun. dir is an empty directory on a
	// memory-backed file system for temporary files. The container is frozen
	// afterwards, after errors too. Errors carry the decisive lines of CRIU's log.
	Dump(ctx context.Context, c Container, m Memory, dir string, out *checkpoint.Writer, round uint32) (Dumped, error)

	// Recover ends what a Dump that was cut off by the end of this process has left
	// behind in dir, and leaves the container frozen.
	Recover(ctx context.Context, c Container, dir string) error
}
