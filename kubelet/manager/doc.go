// Package manager sets the hooks of the patched controller manager: endpoints keep a pod
// whose deletion waits (package deferral), and a ReplicaSet counts a pod that moves once.
package manager
