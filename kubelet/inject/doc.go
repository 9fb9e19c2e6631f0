// Package inject sets the hooks of the patched kubelet and gives the agent what it
// needs of the kubelet around it. It and kubelet/cmd/kubelet are the only packages
// that import k8s.io/kubernetes; a rebase of Kubernetes touches them and the patches.
//
// The files that name hooks carry the build tag podmig_patched, which the Makefile
// sets together with the patched sources. With the feature gate PodMigration off
// nothing is injected and every hook does what upstream does.
//
// The package has no logic worth a unit test of its own; the end-to-end tests run it.
package inject
