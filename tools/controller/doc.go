// Package controller carries out PodMigration objects: it creates the clone of a pod,
// follows the clone's condition, and records how the migration ended.
//
// It works from what it observes: every step can be taken again after a crash at any
// point, by the same process or another one. What may run at a time is decided by
// admissible, a pure function over all migrations, so the reconciler must not run twice
// at once (leader election, one worker). Whether processes run is never decided here but
// by the kubelets: the controller only creates clones, asks to cancel and deletes clones
// that have failed.
package controller
