//go:build e2e

package faults

import (
	"testing"

	"podmig.dev/podmig/cluster-setup/cluster"
)

// Pods that are deleted in the middle.
func TestFaultPodDeleted(t *testing.T) {
	runAll(t, []scenario{
		{name: "clone", at: beforeFreeze, breaks: remove(clonePod), ends: source, cloneGone: true},
		{name: "clone", at: frozenTarget, breaks: remove(clonePod), ends: source, cloneGone: true},
		// After the commit it is restored first and then ends like any other pod.
		{name: "clone", at: restores, breaks: remove(clonePod), ends: "", cloneGone: true},
		{name: "clone", at: saysDone, breaks: remove(clonePod), ends: "", cloneGone: true},
		{name: "source", at: beforeFreeze, breaks: all(remove(sourcePod), waitGone(sourcePod)), ends: "", sourceGone: true,
			reasons: []string{"StreamFailed", "FreezeFailed", "VerifyFailed", "SourceRefused"}},
		// Before the commit its deletion ends the migration.
		{name: "source", at: frozenTarget, breaks: all(remove(sourcePod), waitGone(sourcePod)), ends: "", sourceGone: true,
			reasons: []string{"SourceRefused"}},
		// Afterwards it waits until the clone runs.
		{name: "source", at: givenAway, breaks: remove(sourcePod), ends: target, sourceGone: true},
		{name: "source", at: saysDone, breaks: remove(sourcePod), ends: target, sourceGone: true},
	})
}

// Waits that take too long.
func TestFaultDeadline(t *testing.T) {
	runAll(t, []scenario{
		{name: "the target does not ask for the freeze", at: beforeFreeze, breaks: all(runsOn(source), pause(deadlines.Stream)), ends: source,
			reasons: []string{"FreezeFailed", "StreamFailed", "DeadlineExceeded", "VerifyFailed"}},
		{name: "the target does not commit", at: asksCommit, breaks: all(frozen(outage), runsOn(source)), ends: source, reasons: []string{"SourceRefused"}},
		// Until the runtime says that no restored process exists, the source stays frozen.
		{name: "the target's runtime stays away", at: restores, breaks: stop(target, cluster.Containerd),
			after: all(frozen(deadlines.Restore/2+outage), start(target, cluster.Containerd)), ends: source, reasons: []string{"RestoreFailed"}},
	})
}

// Daemons that stay away for a while.
func TestFaultDaemonDown(t *testing.T) {
	api := stop(hub, "kube-apiserver")
	runAll(t, []scenario{
		{name: "API server", at: beforeFreeze, breaks: api, after: all(runsOn(target), start(hub, "kube-apiserver")), ends: target, alone: true},
		{name: "API server", at: givenAway, breaks: api, after: all(runsOn(target), start(hub, "kube-apiserver")), ends: target, alone: true},
		{name: "source kubelet", at: givenAway, breaks: stop(source, cluster.Kubelet), after: all(frozen(outage), start(source, cluster.Kubelet)), ends: target},
		{name: "source containerd", at: stopsSource, breaks: stop(source, cluster.Containerd), after: all(runsOn(target), pause(outage), start(source, cluster.Containerd)), ends: target},
		{name: "target kubelet", at: restores, breaks: stop(target, cluster.Kubelet), after: all(frozen(outage), start(target, cluster.Kubelet)), ends: target},
		{name: "both kubelets", at: givenAway, breaks: all(stop(source, cluster.Kubelet), stop(target, cluster.Kubelet)),
			after: all(frozen(outage), start(target, cluster.Kubelet), start(source, cluster.Kubelet)), ends: target},
	})
}
