// Package controller has podmig's three controllers. Migrations carries out PodMigration
// objects: it creates the clone of a pod, follows the clone's condition, and records how the
// migration ended. Deletions looks at pods whose deletion waits (kubelet/deferral): it
// orders a PodMigration for each, or lets it go. MigratingPods keeps one pod of every
// MigratingPod running and moves none.
//
// They work from what they observe: every step can be taken again after a crash at any
// point, by the same process or another one. What may run at a time is decided by
// admissible, a pure function over all migrations, so Migrations must not run twice
// at once (leader election, one worker); next and deferral.Replicas decide the same way for the
// other two. Whether processes run is never decided here but by the kubelets: the
// controllers only create pods, ask to cancel, delete clones that have failed and sources that
// were given away, and take off the finalizer.
package controller
