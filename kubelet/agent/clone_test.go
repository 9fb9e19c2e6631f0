package agent

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"podmig.dev/podmig/kubelet/migration"
)

// The API server forbids a node to read what it does not know, a source that is gone
// among it, and a new clone for a moment.
func TestForbiddenSources(t *testing.T) {
	t.Run("gone", func(t *testing.T) {
		w := newWorld(t)
		clone := w.put("clone", "b", "source")
		w.forbidden = func(name string) bool { return name == "source" }
		began := time.Now()
		err := w.sync(t.Context(), clone)
		if err == nil || !strings.Contains(err.Error(), `no pod "source"`) {
			t.Errorf("error %v", err)
		}
		if took := time.Since(began); took > findTimeout/2 {
			t.Errorf("it took %s", took)
		}
		if _, reason, _ := w.cloned("clone"); reason != "SourceLost" {
			t.Errorf("reason %s", reason)
		}
	})
	t.Run("not known yet", func(t *testing.T) {
		w := newWorld(t)
		w.running("source")
		clone := w.put("clone", "b", "source")
		var asked atomic.Int32
		w.forbidden = func(string) bool { return asked.Add(1) < 6 }
		if err := w.sync(t.Context(), clone); err != nil {
			t.Fatal(err)
		}
		w.moved(t)
	})
	t.Run("known in between", func(t *testing.T) {
		w := newWorld(t)
		w.running("source")
		clone := w.put("clone", "b", "source")
		var asked atomic.Int32
		w.forbidden = func(string) bool { return asked.Add(1) == 1 }
		if err := w.sync(t.Context(), clone); err != nil {
			t.Fatal(err)
		}
		w.moved(t)
	})
}

// Where migrations were switched off with some under way, they come to their end and
// no other begins.
func TestDraining(t *testing.T) {
	tests := []struct {
		node, point string
		moves       bool
	}{
		{"a", "source.answer-freeze-ok", false},
		{"a", "source.answer-commit-ok", true},
		{"b", "target.verify", false},
		{"b", "target.restore", true},
	}
	for _, tt := range tests {
		t.Run(tt.node+" at "+tt.point, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			err := w.crash(t, tt.node, tt.point, clone, func(n *testNode) { n.draining = true })
			if tt.moves {
				if err != nil {
					t.Fatal(err)
				}
				w.moved(t)
			} else {
				_, reason, _ := w.cloned("clone")
				w.stayed(t, reason, "")
			}

			w.running("another")
			again := w.put("again", "b", "another")
			if err := w.sync(t.Context(), again); err == nil || !strings.Contains(err.Error(), "PodMigration is switched off on node "+tt.node) {
				t.Errorf("another migration: %v", err)
			}
			want := map[string]string{"a": "SourceRefused", "b": "MigrationDisabled"}[tt.node]
			if _, reason, _ := w.cloned("again"); reason != want {
				t.Errorf("another migration: reason %s, want %s", reason, want)
			}
			if a := w.nodes["a"]; !a.runtime.Active(a.id("another")) {
				t.Error("the other pod does not run any more")
			}
		})
	}
}

// When the pods have ended, the API server tells no node any more where the other is.
// What is left to be said is said all the same.
func TestHiddenNodes(t *testing.T) {
	for _, tt := range []struct{ node, point string }{
		{"b", "target.call-done"},
		{"a", "source.answer-commit-ok"},
	} {
		t.Run(tt.node+" at "+tt.point, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			if err := w.crash(t, tt.node, tt.point, clone, func(*testNode) { w.hidden.Store(true) }); err != nil {
				t.Fatal(err)
			}
			w.moved(t)
		})
	}
}

// A runtime that goes away in a call has not failed at it.
func TestRuntimeGoesAway(t *testing.T) {
	w := newWorld(t)
	n := w.nodes["b"].current()
	tests := []struct {
		name string
		op   migration.Op
		err  error
		want migration.Event
	}{
		{"gone", migration.OpVerify, status.Error(codes.Unavailable, "EOF"), migration.RuntimeRestarted{Message: "EOF"}},
		{"failed", migration.OpVerify, status.Error(codes.Internal, "no"), migration.RuntimeFailed{Op: migration.OpVerify, Message: "no"}},
		{"gone, asked again", migration.OpFinishRestore, status.Error(codes.Unavailable, "EOF"), migration.RuntimeFailed{Op: migration.OpFinishRestore, Message: "EOF"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDriver(t.Context(), migration.SideTarget, migration.NewTarget(migration.Identity{Session: "s"}, deadlines), n.cfg.Journal)
			d.fail(tt.op, tt.err)
			if got, ok := d.next(); !ok || got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
	t.Run("in the middle of a migration", func(t *testing.T) {
		w := newWorld(t)
		w.running("source")
		clone := w.put("clone", "b", "source")
		w.nodes["b"].runtime.Fail = failing("VerifyRestore", codes.Unavailable)
		_ = w.sync(t.Context(), clone)
		w.stayed(t, "RuntimeRestarted", "runtime went away")
	})
}
