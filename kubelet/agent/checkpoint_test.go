package agent

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/cri-api/migration/migrationtest"
	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/wire"
)

// free checks that nothing holds a pod of node a any more.
func free(t *testing.T, w *world, pod string) {
	t.Helper()
	a := w.nodes["a"]
	if _, held := a.guard.Held("uid-of-pod-" + pod); held || a.current().ProbesSuspended("uid-of-pod-"+pod) {
		t.Error("the pod is held")
	}
	a.current().mu.Lock()
	defer a.current().mu.Unlock()
	if len(a.current().takings) > 0 {
		t.Error("the checkpoint is not forgotten")
	}
}

func TestCheckpoint(t *testing.T) {
	w := newWorld(t)
	w.running("source")
	w.mu.Lock()
	w.pods["source"].Spec.Volumes = []v1.Volume{{Name: "data", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}}, {Name: "c", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{}}}}
	w.mu.Unlock()
	a, dir := w.nodes["a"], t.TempDir()
	var asked *runtimeapi.CheckpointPodRequest
	a.checkpoint = func(ctx context.Context, r *runtimeapi.CheckpointPodRequest) error {
		asked = r
		if _, ok := ctx.Deadline(); !ok {
			t.Error("the call has no deadline")
		}
		if h, held := a.guard.Held("uid-of-pod-source"); !held || !strings.Contains(h.Refuse, "frozen for a checkpoint") || !a.current().ProbesSuspended("uid-of-pod-source") {
			t.Error("the pod is not guarded while it stands still")
		}
		return nil
	}
	if err := a.current().Checkpoint(t.Context(), "ns", "source", "anna", dir); err != nil {
		t.Fatal(err)
	}
	if asked.PodSandboxId != "sandbox-uid-of-pod-source" || !slices.Equal(asked.ContainerIds, []string{a.id("source")}) || asked.OutputPath != dir {
		t.Errorf("the runtime was asked for %v", asked)
	}
	if len(asked.Options) != 1 || asked.Options[cri.VolumeOption+"data"] != filepath.Join(a.dir, "uid-of-pod-source", "data") {
		t.Errorf("the volumes are %v", asked.Options)
	}
	free(t, w, "source")
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.events) != 1 || !strings.Contains(a.events[0], `source Checkpointed: A checkpoint with the memory of the pod was written for user "anna"`) {
		t.Errorf("events: %q", a.events)
	}
}

func TestCheckpointIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*world)
		code   wire.Code
		text   string
	}{
		{"no pod", func(w *world) { w.pods["source"].Name = "other"; delete(w.pods, "source") }, wire.CodeUnknownPod, "pod ns/source is not on node a; ask"},
		{"a pod of another node", func(w *world) { w.pods["source"].Spec.NodeName = "b" }, wire.CodeUnknownPod, "is not on node a"},
		{"ended", func(w *world) { w.pods["source"].Status.Phase = v1.PodSucceeded }, wire.CodeNotRunning, "pod source is Succeeded, not Running"},
		{"new", func(w *world) { w.pods["source"].Status.Phase = "" }, wire.CodeNotRunning, "pod source is Pending, not Running"},
		{"being deleted", func(w *world) { w.pods["source"].DeletionTimestamp = &metav1.Time{Time: time.Now()} }, wire.CodeNotRunning, "is being deleted"},
		{"a clone that waits", func(w *world) { w.pods["source"].Annotations = map[string]string{cloneOf: "x"} }, wire.CodeNotRunning, "has not taken over"},
		{"host network", func(w *world) { w.pods["source"].Spec.HostNetwork = true }, wire.CodeMismatch, "namespace of its node"},
		{"a container that has ended", func(w *world) { w.nodes["a"].runtime.Remove(w.nodes["a"].containers["uid-of-pod-source"][0].ID) }, wire.CodeNotRunning, `container "main"`},
		{"moving", func(w *world) { w.nodes["a"].current().pods["uid-of-pod-source"] = "s" }, wire.CodeBusy, "moving to another node (session s); wait"},
		{"moved a moment ago", func(w *world) {
			w.nodes["a"].guard.Set("uid-of-pod-source", guard.Hold{Refuse: "the pod runs on elsewhere"})
		}, wire.CodeBusy, "has not quite ended; try again"},
		{"twice", func(w *world) { w.nodes["a"].current().takings["uid-of-pod-source"] = &taking{} }, wire.CodeBusy, "is being taken; wait"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.running("source")
			a := w.nodes["a"]
			a.checkpoint = func(context.Context, *runtimeapi.CheckpointPodRequest) error {
				t.Error("the runtime was asked")
				return nil
			}
			tt.change(w)
			err := a.current().Checkpoint(t.Context(), "ns", "source", "anna", t.TempDir())
			if wire.CodeOf(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v, want %s with %q", err, tt.code, tt.text)
			}
			// What a migration holds stays held.
			if h, held := a.guard.Held("uid-of-pod-source"); held != strings.Contains(tt.name, "moved") || held && !strings.Contains(h.Refuse, "elsewhere") {
				t.Errorf("the pod is held: %t, %q", held, h.Refuse)
			}
			if len(a.events) > 0 {
				t.Errorf("events: %q", a.events)
			}
		})
	}
}

func TestCheckpointFails(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		code wire.Code
		text string
	}{
		{"no such call", status.Error(codes.Unimplemented, "unknown method"), wire.CodeNoRuntime, "run a containerd with the migration service"},
		{"not now", status.Error(codes.FailedPrecondition, "container main is paused"), wire.CodePreflight, "container main is paused"},
		{"full", status.Error(codes.ResourceExhausted, "no space"), wire.CodeRuntime, "no space"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.running("source")
			w.nodes["a"].checkpoint = func(context.Context, *runtimeapi.CheckpointPodRequest) error { return tt.err }
			err := w.nodes["a"].current().Checkpoint(t.Context(), "ns", "source", "anna", t.TempDir())
			if wire.CodeOf(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v, want %s with %q", err, tt.code, tt.text)
			}
			free(t, w, "source")
		})
	}
}

// Whoever stops the pod does not wait for its checkpoint, and who asked for it is told.
func TestCheckpointIsGivenUpWhenThePodIsStopped(t *testing.T) {
	w := newWorld(t)
	w.running("source")
	a := w.nodes["a"]
	stopped := make(chan error, 1)
	a.checkpoint = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
		h, _ := a.guard.Held("uid-of-pod-source")
		go func() { stopped <- h.BeforeStop(context.Background()) }()
		<-ctx.Done()
		select {
		case <-stopped:
			t.Error("it is stopped while the runtime has it")
		case <-time.After(10 * time.Millisecond):
		}
		return status.FromContextError(ctx.Err()).Err()
	}
	err := a.current().Checkpoint(t.Context(), "ns", "source", "anna", t.TempDir())
	if wire.CodeOf(err) != wire.CodeAborted || !strings.Contains(err.Error(), "is being stopped") {
		t.Error(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	free(t, w, "source")
}

// A client that has gone ends the checkpoint.
func TestCheckpointEndsWithItsCaller(t *testing.T) {
	w := newWorld(t)
	w.running("source")
	ctx, cancel := context.WithCancel(t.Context())
	w.nodes["a"].checkpoint = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
		cancel()
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	if err := w.nodes["a"].current().Checkpoint(ctx, "ns", "source", "anna", t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	free(t, w, "source")
}

// A migration that comes while a checkpoint is taken is refused, and the pod moves when
// it is over.
func TestMigrationWaitsForNoCheckpoint(t *testing.T) {
	w := newWorld(t)
	clone := w.pair()
	a := w.nodes["a"]
	a.checkpoint = func(context.Context, *runtimeapi.CheckpointPodRequest) error {
		if err := w.sync(t.Context(), clone); err == nil || !strings.Contains(err.Error(), "a checkpoint of the pod is being taken") {
			t.Errorf("the clone: %v", err)
		}
		return nil
	}
	if err := a.current().Checkpoint(t.Context(), "ns", "source", "anna", t.TempDir()); err != nil {
		t.Fatal(err)
	}
	w.stayed(t, "SourceRefused", "a checkpoint of the pod is being taken")
	free(t, w, "source")
	second := w.put("second", "b", "source")
	if err := w.sync(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second clone runs", func() bool { return w.nodes["b"].runtime.State(w.nodes["b"].id("second")) == migrationtest.Running })

	// A pod that moved away a moment ago stays guarded, whatever its status says yet.
	eventually(t, "the source is held by the migration only", func() bool {
		w.mu.Lock()
		w.pods["source"].Status.Phase = v1.PodRunning
		w.mu.Unlock()
		err := a.current().Checkpoint(t.Context(), "ns", "source", "anna", t.TempDir())
		if err == nil {
			t.Fatal("a pod that has moved away was checkpointed")
		}
		h, held := a.guard.Held("uid-of-pod-source")
		return held && strings.Contains(h.Refuse, "runs on as pod second")
	})
}
