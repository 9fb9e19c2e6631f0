//go:build e2e

package faults

import (
	"testing"

	"podmig.dev/podmig/cluster-setup/cluster"
)

// Where a migration stands at a point. Frozen and given away are seen from both sides.
const (
	beforeFreeze  = "target.call-freeze"                // the stream flows, the pod runs
	freezes       = "source.freeze"                     // the source is about to freeze
	frozenSource  = "source.answer-freeze-ok"           // frozen, the answer not yet sent
	frozenTarget  = "target.journal-committing-durable" // everything arrived and is verified
	asksCommit    = "target.call-commit"                // the target's journal knows
	givesAway     = "source.journal-givenaway-durable"  // the source's journal does not know
	givenAway     = "source.answer-commit-ok"           // it does, the answer not yet sent
	restores      = "target.restore"                    // the answer was read
	restored      = "target.journal-running-durable"    // the clone runs, the journal does not know
	saysDone      = "target.call-done"                  // the source does not know
	stopsSource   = "source.finish-checkpoint-stop"     // the source knows
	marksSource   = "source.mark-migrated"              // the API server does not know
	recordsCloned = "target.record-cloned-true-cloned"  // the API server does not know
)

// Daemons that end and are started again.
func TestFaultDaemonKilled(t *testing.T) {
	runAll(t, []scenario{
		{name: "target kubelet", at: beforeFreeze, breaks: kill(target, cluster.Kubelet), ends: source, reasons: []string{"KubeletRestarted"}},
		{name: "source kubelet", at: freezes, breaks: kill(source, cluster.Kubelet), ends: source, reasons: []string{"StreamFailed", "FreezeFailed", "VerifyFailed"}},
		{name: "target containerd", at: beforeFreeze, breaks: kill(target, cluster.Containerd), ends: source, reasons: []string{"StreamFailed", "VerifyFailed", "RuntimeRestarted"}},
		{name: "source containerd", at: freezes, breaks: kill(source, cluster.Containerd), ends: source, reasons: []string{"StreamFailed", "FreezeFailed", "VerifyFailed"}},

		{name: "target kubelet", at: frozenTarget, breaks: kill(target, cluster.Kubelet), ends: source, reasons: []string{"KubeletRestarted"}},
		{name: "source kubelet", at: frozenSource, breaks: kill(source, cluster.Kubelet), ends: source, reasons: []string{"FreezeFailed", "SourceRefused"}},
		{name: "target containerd", at: frozenTarget, breaks: kill(target, cluster.Containerd), ends: target},
		{name: "source containerd", at: frozenTarget, breaks: all(knowsFrozen, kill(source, cluster.Containerd)), ends: target},
		{name: "target kubelet", at: asksCommit, breaks: kill(target, cluster.Kubelet), ends: target},
		{name: "source kubelet", at: givesAway, breaks: kill(source, cluster.Kubelet), ends: source, reasons: []string{"SourceRefused"}},

		{name: "source kubelet", at: givenAway, breaks: kill(source, cluster.Kubelet), ends: target},
		{name: "target kubelet", at: restores, breaks: kill(target, cluster.Kubelet), ends: target},
		{name: "source containerd", at: givenAway, breaks: kill(source, cluster.Containerd), ends: target},
		{name: "target containerd", at: restores, breaks: kill(target, cluster.Containerd), ends: target},
		{name: "target kubelet", at: restored, breaks: kill(target, cluster.Kubelet), ends: target},
		{name: "source kubelet", at: stopsSource, breaks: kill(source, cluster.Kubelet), ends: target},
		{name: "source containerd", at: stopsSource, breaks: kill(source, cluster.Containerd), ends: target},
		{name: "target kubelet", at: saysDone, breaks: kill(target, cluster.Kubelet), ends: target},
		{name: "source kubelet", at: marksSource, breaks: kill(source, cluster.Kubelet), ends: target},
		{name: "target containerd", at: saysDone, breaks: kill(target, cluster.Containerd), ends: target},
		{name: "target kubelet", at: recordsCloned, breaks: kill(target, cluster.Kubelet), ends: target},
	})
}
