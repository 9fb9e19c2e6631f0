// Package v1alpha1 has the types and the words of podmig's Kubernetes API: the objects
// of group podmig.dev, and condition types, their reasons, and reasons of events of the
// pods that move.
//
// The words are part of the API: they do not change within this version, and tools
// may act on them. A test of package migration holds them equal to those that the
// engine uses. The package has no behaviour; deep copies and the custom resource
// definitions in cluster-setup/manifests/crds are generated from it (make generate).
//
// +kubebuilder:object:generate=true
// +groupName=podmig.dev
package v1alpha1
