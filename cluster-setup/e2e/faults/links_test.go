//go:build e2e

package faults

import (
	"testing"
	"time"

	"podmig.dev/podmig/cluster-setup/cluster"
)

// outage is how long a short fault lasts.
const outage = 2 * time.Second

// The cable of a node, cut and healed. Neither node hears anything of the other nor of
// the API server.
func TestFaultLinkCut(t *testing.T) {
	runAll(t, []scenario{
		{name: "source", at: beforeFreeze, breaks: cut(source), after: all(pause(outage), heal(source)), ends: target},
		{name: "target for long", at: beforeFreeze, breaks: cut(target),
			// The source gives up by itself when its deadline has passed; it never stopped running.
			after: all(runsOn(source), pause(deadlines.Stream), heal(target)), ends: source,
			reasons: []string{"DeadlineExceeded", "FreezeFailed", "StreamFailed", "VerifyFailed"}},
		{name: "target while frozen", at: frozenTarget, breaks: cut(target), after: all(frozen(outage), heal(target)), ends: target},
		{name: "source while frozen for long", at: frozenTarget, breaks: cut(source),
			// Before the commit a source that hears nothing thaws its pod.
			after: all(runsOn(source), heal(source)), ends: source, reasons: []string{"SourceRefused"}},
		{name: "source with the answer to the commit", at: givenAway, breaks: cut(source),
			after: all(frozen(outage), heal(source)), ends: target},
		{name: "source with the answer to the commit for long", at: givenAway, breaks: cut(source),
			// Longer than every deadline of the source: given away stays given away.
			after: all(frozen(deadlines.Freeze+deadlines.Outcome), heal(source)), ends: target},
		{name: "target before the restore", at: restores, breaks: cut(target), after: all(runsOn(target), pause(outage), heal(target)), ends: target},
		{name: "source before done", at: saysDone, breaks: cut(source), after: all(runsOn(target), pause(outage), heal(source)), ends: target},
		{name: "answer to the commit lost and the source's kubelet with it", at: givenAway,
			breaks: all(cut(source), kill(source, cluster.Kubelet)), after: all(frozen(outage), heal(source)), ends: target},
	})
}
