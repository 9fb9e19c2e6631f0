//go:build e2e

package faults

import (
	"testing"

	"podmig.dev/podmig/cluster-setup/cluster"
)

// gateOff switches the feature gate of a node off and lets its kubelet restart with it,
// as an operator does who wants no migrations any more.
func gateOff(node string) func(*fault) error {
	const config = "/etc/kubernetes/kubelet.yaml"
	return func(f *fault) error {
		f.later(func() {
			err := command(node, "sh", "-ec", "cat /run/kubelet.yaml >"+config+"; rm /run/kubelet.yaml")(f)
			if err == nil {
				err = kill(node, cluster.Kubelet)(f)
			}
			if err != nil {
				f.Error(err)
			}
		})
		err := command(node, "sh", "-ec", "cp "+config+" /run/kubelet.yaml; grep -q 'PodMigration: true' "+config+
			"; sed 's/PodMigration: true/PodMigration: false/' /run/kubelet.yaml >"+config)(f)
		if err != nil {
			return err
		}
		return kill(node, cluster.Kubelet)(f)
	}
}

// A kubelet that is restarted without the feature gate in the middle of a migration: the
// pod neither stays frozen nor runs twice.
func TestFaultGateOff(t *testing.T) {
	runAll(t, []scenario{
		{name: "source's gate switched off", at: frozenSource, breaks: gateOff(source), ends: source, reasons: []string{"FreezeFailed", "SourceRefused"}},
		{name: "source's gate switched off", at: givenAway, breaks: gateOff(source), ends: target},
		{name: "source's gate switched off", at: stopsSource, breaks: gateOff(source), ends: target},
		{name: "target's gate switched off", at: frozenTarget, breaks: gateOff(target), ends: source, reasons: []string{"KubeletRestarted"}},
		{name: "target's gate switched off", at: restores, breaks: gateOff(target), ends: target},
		{name: "target's gate switched off", at: saysDone, breaks: gateOff(target), ends: target},
	})
}
