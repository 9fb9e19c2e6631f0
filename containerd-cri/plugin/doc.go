// Package plugin joins the migration service to containerd: a gRPC plugin on
// containerd's own socket, beside the CRI, and the adapter that makes containers of
// the CRI service the service's port.
//
// It and cmd/containerd are the only packages that import containerd's registry.
// Starting a container from a checkpoint, and serving the CRI's CheckpointPod and
// RestorePod, needs hooks in containerd (patches/containerd); the file that names
// them has the build tag podmig_patched. Without it the package builds against
// pristine containerd, and restores are refused with the reason.
package plugin
