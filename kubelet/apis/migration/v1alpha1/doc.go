// Package v1alpha1 has the words by which podmig talks about pods in the Kubernetes
// API: condition types, their reasons, and reasons of events.
//
// The words are part of the API: they do not change within this version, and tools
// may act on them. A test of package migration holds them equal to those that the
// engine uses. The package has no behaviour.
package v1alpha1
