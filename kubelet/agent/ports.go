package agent

import (
	"context"

	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/kubelet/migration"
)

// Node is the kubelet around the agent. Its methods may be called concurrently
// and do not block for long.
type Node interface {
	// Name of the node.
	Name() string
	// Pod returns a pod that is bound to this node.
	Pod(uid string) (*v1.Pod, bool)
	// PodByName is Pod by namespace and name.
	PodByName(namespace, name string) (*v1.Pod, bool)
	// ClonePod returns spec.clonePod, a field that upstream's API types lack.
	ClonePod(pod *v1.Pod) string
	// AddedPrivileges names what clone may do and source may not. Admission has asked
	// the same, of the pod that had the source's name then.
	AddedPrivileges(clone, source *v1.Pod) []string
	// Terminate ends a pod for good, with the status that the function writes into
	// it. It returns when nothing will be started in the pod any more.
	Terminate(ctx context.Context, pod *v1.Pod, status func(*v1.PodStatus))
	// Event records an event on a pod.
	Event(ctx context.Context, pod *v1.Pod, warning bool, reason, message string)
	// EmptyDir returns the directory of an emptyDir volume.
	EmptyDir(podUID, volume string) string
	// LogDirectory returns the directory of a container's log files.
	LogDirectory(pod *v1.Pod, container string) string
	// MemoryAvailable is how much memory a new pod could use, bytes; 0 if unknown.
	MemoryAvailable() uint64
}

// API is the API server. Errors are those of client-go, so apierrors.IsNotFound
// and its like work on them.
type API interface {
	// Pod reads a pod, never from a cache.
	Pod(ctx context.Context, namespace, name string) (*v1.Pod, error)
	// Kubelet returns where the kubelet of a node serves, as HOST:PORT.
	Kubelet(ctx context.Context, node string) (string, error)
	// Fenced tells whether somebody with authority has said that a node is off: the taint
	// node.kubernetes.io/out-of-service.
	Fenced(ctx context.Context, node string) (bool, error)
	// PatchStatus changes the status of a pod of this node. The function gets the
	// current status and may be called again after a conflict.
	PatchStatus(ctx context.Context, namespace, name, uid string, change func(*v1.PodStatus)) error
}

// Containers is the container runtime as the kubelet knows it, past the guard.
type Containers interface {
	// Of returns the ready sandbox of a pod and its containers, the newest of each
	// name. A pod without a ready sandbox has an empty ID.
	Of(ctx context.Context, podUID string) (sandboxID string, containers []Container, err error)
	// LogPath returns where the runtime writes the log of a container.
	LogPath(ctx context.Context, id string) (string, error)
	// Stop ends a container at once. One that does not run is no error.
	Stop(ctx context.Context, id string) error
}

// Container is one container of the runtime.
type Container struct {
	Name string
	ID   string
	// Attempt counts the containers of this name in the pod, from 0.
	Attempt uint32
	// Created, Running: neither means that it has exited or its state is unknown.
	Created bool
	Running bool
}

// Journal keeps records across restarts. Put and Delete are durable when they
// return nil. An error tells with Uncertain whether the old record may be gone.
type Journal interface {
	Put(migration.Record) error
	Delete(side migration.Side, session string) error
	List() ([]migration.Record, error)
}
