//go:build podmig_patched

package inject

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2/ktesting"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"podmig.dev/podmig/kubelet/guard"
)

func TestStartedWaitsForTheRestore(t *testing.T) {
	fake := record.NewFakeRecorder(10)
	g := guard.New()
	g.Set("clone", guard.Hold{WithholdStart: true})
	logger, _ := ktesting.NewTestContext(t)
	r := (&recorder{fake, g}).WithLogger(logger)
	said := func() (all []string) {
		for {
			select {
			case e := <-fake.Events:
				all = append(all, e)
			default:
				return all
			}
		}
	}
	started := func(uid string) {
		r.Event(&v1.ObjectReference{UID: types.UID(uid)}, v1.EventTypeNormal, events.StartedContainer, "Container started")
	}
	started("other")
	r.Event(&v1.ObjectReference{UID: "clone"}, v1.EventTypeNormal, events.CreatedContainer, "Container created")
	if got := said(); len(got) != 2 {
		t.Errorf("said %q", got)
	}
	started("clone")
	if got := said(); len(got) != 0 {
		t.Errorf("before the restore: %q", got)
	}
	g.Admit("clone")
	if got := said(); len(got) != 1 {
		t.Errorf("after the restore: %q", got)
	}
	started("clone")
	if got := said(); len(got) != 1 {
		t.Errorf("restarted: %q", got)
	}
}
