// Package agent carries out what the migration engine decides: it connects the
// machines of kubelet/migration with the container runtime, the other kubelet,
// the API server, the journal, the clock and the kubelet around it.
//
// # Shape
//
// One driver per machine runs the loop event -> Step -> effects. Effects that
// take long run beside the loop and come back as events, so a machine never waits
// for anything but the next event. On the source the requests of the target
// arrive through Open, Session and Status (kubelet/peer serves them over HTTP); on the
// target everything starts in SyncPod, which stands in for the runtime's SyncPod
// while a clone has not taken over yet.
//
// This is the only package of the kubelet side that starts goroutines. Each of
// them belongs to a driver and ends with it; Close ends all of them.
//
// The tests run two agents in one process over a fake network and fake runtimes
// in virtual time: they show that effects are carried out as the engine means
// them. That a real runtime and a real kubelet do what is asked of them is shown
// by the end-to-end tests.
package agent
