// Package inject sets the hooks of the patched kubelet and gives the agent what it
// needs of the kubelet around it. It and kubelet/cmd/kubelet are the only packages
// that import k8s.io/kubernetes; a rebase of Kubernetes touches them and the patches.
//
// The files that name hooks carry the build tag podmig_patched, which the Makefile
// sets together with the patched sources. With the feature gate PodMigration off
// every hook does what upstream does, with two exceptions: pods with clonePod are
// refused, and migrations that the journal knows are brought to their end, because a
// frozen pod would stay frozen otherwise.
//
// The tests cover what is decided here; that the kubelet really goes through the hooks
// is shown by the end-to-end tests.
package inject
