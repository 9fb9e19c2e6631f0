// Package migration is the migration extension of the Container Runtime
// Interface: a gRPC service beside runtime.v1 on the socket of the runtime, with
// which a kubelet moves the running containers of a pod to another node.
//
// The contract is migration.proto; the Go code is generated from it. This package
// adds the names that the two sides must agree on and has no behaviour.
// Package migrationtest, beside this one, holds a fake runtime and the conformance
// suite that the fake and every real implementation pass.
package migration

// StreamVersion is the version of the checkpoint stream that this module writes.
const StreamVersion uint32 = 1

// StreamReady is the byte that a runtime writes to the peer of the stream that it
// receives when the source waits for its freeze.
const StreamReady byte = 'R'

// StreamExpected is the byte that it may write there before, any number of times, each time
// with eight bytes behind it, big endian: for how many nanoseconds the frozen containers would
// wait until the memory that they have written since the last round is sent.
const StreamExpected byte = 'E'

// A checkpoint of a pod, as the CRI's CheckpointPod writes it into a directory, has two
// files: the stream that a migration would send, and its manifest once more. The manifest
// is written last.
const (
	PodStream   = "checkpoint.stream"
	PodManifest = "manifest.json"
	// PodSession names the session in the streams of these checkpoints.
	PodSession = "pod"
)

// VolumeOption begins the options of CheckpointPod and RestorePod that name a volume
// whose content belongs to the checkpoint: the rest of the key is its name, the value its
// directory on the node.
const VolumeOption = "podmig.dev/volume."
