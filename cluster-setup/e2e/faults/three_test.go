//go:build e2e

package faults

import (
	"testing"

	"podmig.dev/podmig/cluster-setup/cluster"
)

// A pod of three containers, one of them a sidecar: all of them move, or none.
func TestFaultThree(t *testing.T) {
	all3 := []scenario{
		{name: "source kubelet", at: frozenTarget, breaks: all(knowsFrozen, kill(source, cluster.Kubelet)), ends: source, reasons: []string{"SourceRefused"}},
		{name: "target kubelet", at: restores, breaks: kill(target, cluster.Kubelet), ends: target},
		{name: "target containerd", at: restores, breaks: kill(target, cluster.Containerd), ends: target},
		{name: "answer to the commit lost", at: givenAway, breaks: cut(source), after: all(frozen(outage), heal(source)), ends: target},
		duringRestore(scenario{name: "target kubelet killed during the restore", breaks: kill(target, cluster.Kubelet), ends: target}),
		duringRestore(scenario{name: "target containerd killed during the restore", breaks: kill(target, cluster.Containerd), ends: source,
			reasons: []string{"RestoreFailed"}}),
	}
	for i := range all3 {
		all3[i].three = true
	}
	runAll(t, all3)
}
