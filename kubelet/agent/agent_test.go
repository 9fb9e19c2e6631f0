package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/cri-api/migration/migrationtest"
	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
)

// atMostOne watches that never both containers run, until the test ends.
func (w *world) atMostOne(source, clone string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		look := time.NewTicker(200 * time.Microsecond)
		defer look.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-look.C:
			}
			if w.nodes["a"].runtime.Active(w.nodes["a"].id(source)) && w.nodes["b"].runtime.Active(w.nodes["b"].id(clone)) {
				w.t.Error("both copies run")
				return
			}
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done })
}

// eventually waits for what happens after an answer was given.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// moved checks that the clone runs on and the source is no more.
func (w *world) moved(t *testing.T) {
	t.Helper()
	a, b := w.nodes["a"], w.nodes["b"]
	eventually(t, "the clone runs", func() bool { return b.runtime.Active(b.id("clone")) })
	eventually(t, "the source is stopped", func() bool { return a.runtime.State(a.id("source")) != migrationtest.Running })
	eventually(t, "condition Cloned is True", func() bool { s, _, _ := w.cloned("clone"); return s == v1.ConditionTrue })
	eventually(t, "the source says Migrated", func() bool { return w.status("source").Reason == "Migrated" })
	if s := w.status("source"); s.Phase != v1.PodFailed || !strings.Contains(s.Message, "clone on node b") {
		t.Errorf("source: %s, %q", s.Phase, s.Message)
	}
	a.mu.Lock()
	terminated := a.terminated["source"]
	a.mu.Unlock()
	if !terminated {
		t.Error("the kubelet was not told that the source ended")
	}
	w.nothingLeft(t)
}

// stayed checks that the source runs on and the clone failed with the reason.
func (w *world) stayed(t *testing.T, reason, text string) {
	t.Helper()
	a, b := w.nodes["a"], w.nodes["b"]
	eventually(t, "condition Cloned is False", func() bool { s, _, _ := w.cloned("clone"); return s == v1.ConditionFalse })
	if _, r, m := w.cloned("clone"); r != reason || !strings.Contains(m, text) {
		t.Errorf("condition Cloned: %s: %s; want %s with %q", r, m, reason, text)
	}
	if s := w.status("clone"); s.Phase != v1.PodFailed {
		t.Errorf("the clone is %s", s.Phase)
	}
	if b.runtime.Active(b.id("clone")) {
		t.Error("the clone runs")
	}
	eventually(t, "the source runs", func() bool { return a.runtime.Active(a.id("source")) })
	if s := w.status("source"); s.Phase != v1.PodRunning {
		t.Errorf("the source is %s", s.Phase)
	}
	w.nothingLeft(t)
}

func (w *world) nothingLeft(t *testing.T) {
	t.Helper()
	for name, n := range w.nodes {
		eventually(t, "node "+name+" has forgotten the session", func() bool { return n.runtime.Sessions() == 0 })
		eventually(t, "node "+name+" has an empty journal", func() bool {
			rs, err := n.current().cfg.Journal.List()
			return err == nil && len(rs) == 0
		})
		for _, pod := range []string{"source", "clone"} {
			eventually(t, "nothing is held on node "+name, func() bool {
				h, held := n.guard.Held("uid-of-pod-" + pod)
				if p, here := n.Pod("uid-of-pod-" + pod); held && here && p.Status.Reason == v1alpha1.ReasonMigrated {
					// A pod that has moved away may end, and nothing starts in it any more.
					held = h.Refuse == "" || h.BeforeStop != nil
				}
				return !held && !n.current().ProbesSuspended("uid-of-pod-"+pod)
			})
		}
	}
}

func TestMove(t *testing.T) {
	w := newWorld(t)
	clone := w.pair()
	a, b := w.nodes["a"], w.nodes["b"]

	// While it is frozen nobody gets at the source.
	var refused, probes error
	a.at("source.answer-freeze-ok", func() {
		refused = a.current().RefuseKill("uid-of-pod-source")
		if !a.current().ProbesSuspended("uid-of-pod-source") {
			probes = errors.New("probes are not suspended")
		}
	})
	if err := w.sync(t.Context(), clone); err != nil {
		t.Fatal(err)
	}
	w.moved(t)
	if refused == nil || !strings.Contains(refused.Error(), "frozen") {
		t.Errorf("killing the frozen source: %v", refused)
	}
	if probes != nil {
		t.Error(probes)
	}
	if n, err := b.runtime.Count(b.id("clone")); err != nil || n == 0 {
		t.Errorf("the clone counts %d, %v", n, err)
	}
	if b.current().Takes(clone) {
		t.Error("the clone would be taken over again")
	}
	i := slices.IndexFunc(w.status("clone").Conditions, func(c v1.PodCondition) bool { return c.Type == v1alpha1.ConditionTransfer })
	if i < 0 || !strings.HasPrefix(w.status("clone").Conditions[i].Message, v1alpha1.TransferBytes+"=") || !strings.Contains(w.status("clone").Conditions[i].Message, v1alpha1.TransferFrozen+"=") {
		t.Errorf("it is not told how much was moved: %v", w.status("clone").Conditions)
	}
}

func TestRefusals(t *testing.T) {
	tests := []struct {
		name   string
		change func(w *world)
		reason string
		text   string
	}{
		{"no source", func(w *world) { w.put("clone", "b", "nobody") }, "SourceLost", `no pod "nobody"`},
		{"same node", func(w *world) { w.put("other", "b", ""); w.put("clone", "b", "other") }, "TargetUnfit", "place the clone on another node"},
		{"other image", func(w *world) { w.pods["source"].Spec.Containers[0].Image = "image:2" }, "SourceRefused", "image"},
		{"not running", func(w *world) { w.pods["source"].Status.Phase = v1.PodSucceeded }, "SourceRefused", "not Running"},
		{"no extension", func(w *world) {
			w.nodes["a"].runtime.Fail = func(_ context.Context, method, _ string) error {
				if method == "Features" {
					return status.Error(codes.Unimplemented, "unknown service")
				}
				return nil
			}
		}, "SourceRefused", "cannot move pods"},
		{"no extension on the target", func(w *world) {
			w.nodes["b"].runtime.Fail = func(context.Context, string, string) error {
				return status.Error(codes.Unimplemented, "unknown service")
			}
		}, "TargetUnfit", "cannot move pods"},
		{"no CRIU on the target", func(w *world) { w.nodes["b"].runtime.FeaturesReply.CriuVersion = "" }, "TargetUnfit", "no CRIU on node b"},
		{"too little memory on the target", func(w *world) { w.nodes["b"].memory = 1 }, "TargetUnfit", "has 0 MiB"},
		{"CPU feature", func(w *world) { w.nodes["a"].runtime.FeaturesReply.CpuFeatures = []string{"fpu", "avx512f"} }, "TargetUnfit", "lacks avx512f"},
		{"architecture", func(w *world) { w.nodes["a"].runtime.FeaturesReply.Architecture = "arm64" }, "TargetUnfit", "arm64"},
		{"stream version", func(w *world) { w.nodes["a"].runtime.FeaturesReply.StreamVersions = []uint32{9} }, "TargetUnfit", "stream versions"},
		{"no CRIU", func(w *world) { w.nodes["a"].runtime.FeaturesReply.CriuVersion = "" }, "SourceRefused", "no CRIU"},
		{"preflight", func(w *world) {
			w.nodes["a"].runtime.Findings = []*cri.Finding{{
				Severity: cri.Finding_SEVERITY_BLOCKING, Code: "IOUring", Pid: 7, Fd: 3, Message: "fd 3 is an io_uring", Cure: "turn it off",
			}}
		}, "SourceRefused", "io_uring"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.running("source")
			w.put("clone", "b", "source")
			tt.change(w)
			clone, _ := w.Pod(t.Context(), "ns", "clone")
			before := w.nodes["a"].id("source")
			if err := w.sync(t.Context(), clone); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want one with %q", err, tt.text)
			}
			if tt.name == "not running" {
				w.pods["source"].Status.Phase = v1.PodRunning
			}
			w.stayed(t, tt.reason, tt.text)
			if w.nodes["a"].id("source") != before {
				t.Error("the source is not the container it was")
			}
		})
	}
}

func TestOnlyTheNodeOfTheCloneMayAsk(t *testing.T) {
	w := newWorld(t)
	w.running("source")
	w.put("clone", "b", "source")
	w.put("stranger", "b", "")
	a := w.nodes["a"].current()
	call := func(node, session string) peer.Call {
		return peer.Call{
			Session: wire.Session{Namespace: "ns", Pod: "source", ID: session},
			Caller:  peer.Caller{User: "system:node:" + node, Node: node},
		}
	}
	open := func(clone, target string) *wire.OpenRequest {
		return &wire.OpenRequest{Clone: clone, TargetNode: target, SourceUID: "uid-of-pod-source"}
	}
	tests := []struct {
		name string
		call peer.Call
		req  *wire.OpenRequest
	}{
		{"another node", call("c", "uid-of-pod-clone"), open("clone", "c")},
		{"another node that claims to be b", call("c", "uid-of-pod-clone"), open("clone", "b")},
		{"a guessed session", call("b", "uid-of-pod-other"), open("clone", "b")},
		{"a pod that clones nobody", call("b", "uid-of-pod-stranger"), open("stranger", "b")},
		{"no such clone", call("b", "uid-of-pod-missing"), open("missing", "b")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if _, err := a.Open(t.Context(), tt.call, tt.req); wire.CodeOf(err) != wire.CodeForbidden {
				t.Errorf("got %v, want it forbidden", err)
			}
		})
	}
	t.Run("a session of another node", func(t *testing.T) {
		b := w.nodes["b"]
		stop := make(chan struct{})
		reached := make(chan struct{})
		b.at("target.call-commit", func() { close(reached); <-stop })
		done := make(chan error, 1)
		clone, _ := w.Pod(t.Context(), "ns", "clone")
		go func() { done <- w.sync(t.Context(), clone) }()
		<-reached
		for _, node := range []string{"c", "a"} {
			c := call(node, "uid-of-pod-clone")
			_, err := a.Commit(t.Context(), c, &wire.CommitRequest{})
			if wire.CodeOf(err) != wire.CodeForbidden {
				t.Errorf("commit by node %s: %v", node, err)
			}
			if _, err := a.Stream(t.Context(), c); wire.CodeOf(err) != wire.CodeForbidden {
				t.Errorf("stream to node %s: %v", node, err)
			}
		}
		close(stop)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		w.moved(t)
	})
}

// failing makes a method of the runtime fail.
func failing(method string, code codes.Code) func(context.Context, string, string) error {
	return func(_ context.Context, m, _ string) error {
		if m == method {
			return status.Error(code, "criu: it is broken")
		}
		return nil
	}
}

func TestFailures(t *testing.T) {
	tests := []struct {
		name   string
		node   string
		method string
		reason string
	}{
		{"dump", "a", "FreezeCheckpoint", "FreezeFailed"},
		{"session on the source", "a", "PrepareCheckpoint", "StreamFailed"},
		{"session on the target", "b", "PrepareRestore", "PrepareFailed"},
		{"verify", "b", "VerifyRestore", "VerifyFailed"},
		{"restore", "b", "RestoreContainer", "RestoreFailed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			w.nodes[tt.node].runtime.Fail = failing(tt.method, codes.Internal)
			if err := w.sync(t.Context(), clone); err == nil {
				t.Error("the clone reports success")
			}
			_, reason, _ := w.cloned("clone")
			w.stayed(t, reason, "broken")
			if reason != tt.reason {
				t.Errorf("reason %s, want %s", reason, tt.reason)
			}
		})
	}
}

func TestLostAnswers(t *testing.T) {
	for _, verb := range []wire.Verb{wire.VerbOpen, wire.VerbCommit, wire.VerbDone} {
		t.Run(string(verb), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			lost := 0
			w.cut = func(v wire.Verb) bool {
				if v == verb && lost < 3 {
					lost++
					return true
				}
				return false
			}
			if err := w.sync(t.Context(), clone); err != nil {
				t.Fatal(err)
			}
			w.moved(t)
			if lost != 3 {
				t.Errorf("%d answers were lost", lost)
			}
		})
	}
}

// A deletion of the clone before the commit leaves the source as it was.
func TestCancelBeforeTheCommit(t *testing.T) {
	for _, point := range []string{"target.create-containers", "target.receive-stream", "target.call-freeze"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			ctx, cancel := context.WithCancel(t.Context())
			w.nodes["b"].at(point, cancel)
			_ = w.sync(ctx, clone)
			w.stayed(t, "Cancelled", "")
		})
	}
}

// The annotation ends a migration before the commit and nothing afterwards.
func TestCancelByAnnotation(t *testing.T) {
	for _, tt := range []struct {
		point string
		moves bool
	}{
		{"target.create-containers", false},
		{"target.receive-stream", false},
		{"target.call-freeze", false},
		{"target.restore", true},
	} {
		t.Run(tt.point, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			w.nodes["b"].at(tt.point, func() {
				w.mu.Lock()
				w.pods["clone"].Annotations = map[string]string{v1alpha1.AnnotationCancel: "true"}
				w.mu.Unlock()
				// Longer than the kubelet takes to see it.
				time.Sleep(2 * cancelInterval)
			})
			err := w.sync(t.Context(), clone)
			if tt.moves {
				if err != nil {
					t.Fatal(err)
				}
				w.moved(t)
				return
			}
			w.stayed(t, "Cancelled", "asked to cancel")
		})
	}
}

// A dry run asks the source and does nothing else.
func TestDryRun(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clone := w.pair()
	clone.Annotations[v1alpha1.AnnotationDryRun] = "true"
	w.nodes["b"].at("target.prepare-restore", func() { t.Error("the target gets ready") })
	w.nodes["a"].at("source.prepare-checkpoint", func() { t.Error("the source gets ready") })
	if err := w.sync(t.Context(), clone); err == nil || !strings.Contains(err.Error(), "Pod source can move from node a to node b, with the containers") {
		t.Errorf("it says %v", err)
	}
	w.stayed(t, "DryRun", "can move")
}

// A kubelet that goes down at any of these points goes on from its journal.
func TestRestart(t *testing.T) {
	tests := []struct {
		node, point string
		moves       bool
	}{
		{"b", "target.receive-stream", false},
		{"b", "target.verify", false},
		{"b", "target.restore", true},
		{"b", "target.call-done", true},
		{"a", "source.freeze", false},
		{"a", "source.answer-freeze-ok", false},
		{"a", "source.answer-commit-ok", true},
		{"a", "source.mark-migrated", true},
	}
	for _, tt := range tests {
		t.Run(tt.node+" at "+tt.point, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			clone := w.pair()
			err := w.crash(t, tt.node, tt.point, clone, func(*testNode) {})
			if tt.moves {
				if err != nil {
					t.Fatal(err)
				}
				w.moved(t)
				return
			}
			_, reason, _ := w.cloned("clone")
			w.stayed(t, reason, "")
		})
	}
}

// Stopping the frozen source waits until it is clear who owns the pod.
func TestStopOfTheSourceWaits(t *testing.T) {
	w := newWorld(t)
	w.running("source")
	clone := w.put("clone", "b", "source")
	a, b := w.nodes["a"], w.nodes["b"]
	stopped := make(chan error, 1)
	b.at("target.restore", func() {
		h, held := a.guard.Held("uid-of-pod-source")
		if !held {
			t.Error("the source is not held after the commit")
			stopped <- nil
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if err := h.BeforeStop(ctx); err == nil {
			t.Error("the source could be stopped while the target had not restored it")
		}
		go func() { stopped <- h.BeforeStop(context.Background()) }()
	})
	if err := w.sync(t.Context(), clone); err != nil {
		t.Fatal(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	w.moved(t)
}
