// Package migrationtest has what tests of both sides of the CRI extension need: a
// fake runtime, and a conformance suite for any runtime.
//
// The fake keeps containers as counters in memory and obeys the contract of
// migration.proto, streams and errors included; it proves nothing about real
// processes. The suite states that contract as tests. The fake and the real
// containerd both pass it, so what a kubelet test learns from the fake holds for
// the real one.
package migrationtest
