package guard

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recorder is a runtime that knows one pod, "uid", with container "c" in sandbox
// "s", and writes down what reaches it.
type recorder struct {
	internalapi.RuntimeService
	calls []string
}

func (r *recorder) labels() map[string]string {
	return map[string]string{"io.kubernetes.pod.uid": "uid"}
}

func (r *recorder) ContainerStatus(context.Context, string, bool) (*runtimeapi.ContainerStatusResponse, error) {
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Labels: r.labels()}}, nil
}

func (r *recorder) PodSandboxStatus(context.Context, string, bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Labels: r.labels()}}, nil
}

func (r *recorder) call(name string) { r.calls = append(r.calls, name) }

func (r *recorder) CreateContainer(context.Context, string, *runtimeapi.ContainerConfig, *runtimeapi.PodSandboxConfig) (string, error) {
	r.call("create")
	return "c", nil
}
func (r *recorder) StartContainer(context.Context, string) error       { r.call("start"); return nil }
func (r *recorder) StopContainer(context.Context, string, int64) error { r.call("stop"); return nil }
func (r *recorder) RemoveContainer(context.Context, string) error      { r.call("remove"); return nil }
func (r *recorder) StopPodSandbox(context.Context, string) error       { r.call("stop sandbox"); return nil }
func (r *recorder) RemovePodSandbox(context.Context, string) error {
	r.call("remove sandbox")
	return nil
}
func (r *recorder) ExecSync(context.Context, string, []string, time.Duration) ([]byte, []byte, error) {
	r.call("execsync")
	return nil, nil, nil
}
func (r *recorder) Exec(context.Context, *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	r.call("exec")
	return nil, nil
}
func (r *recorder) Attach(context.Context, *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	r.call("attach")
	return nil, nil
}
func (r *recorder) PortForward(context.Context, *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	r.call("portforward")
	return nil, nil
}

// everything calls each guarded method once and returns the errors by name.
func everything(ctx context.Context, s internalapi.RuntimeService) map[string]error {
	errs := make(map[string]error)
	_, errs["create"] = s.CreateContainer(ctx, "s", nil, &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Uid: "uid"}})
	errs["start"] = s.StartContainer(ctx, "c")
	errs["stop"] = s.StopContainer(ctx, "c", 0)
	errs["remove"] = s.RemoveContainer(ctx, "c")
	errs["stop sandbox"] = s.StopPodSandbox(ctx, "s")
	errs["remove sandbox"] = s.RemovePodSandbox(ctx, "s")
	_, _, errs["execsync"] = s.ExecSync(ctx, "c", nil, 0)
	_, errs["exec"] = s.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "c"})
	_, errs["attach"] = s.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: "c"})
	_, errs["portforward"] = s.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "s"})
	return errs
}

func TestHolds(t *testing.T) {
	all := []string{"create", "start", "stop", "remove", "stop sandbox", "remove sandbox", "execsync", "exec", "attach", "portforward"}
	forbidden := errors.New("given away")
	tests := []struct {
		name    string
		uid     string
		hold    Hold
		through []string          // calls that reach the runtime
		errs    map[string]string // calls that fail, with a part of the message
	}{
		{name: "another pod is held", uid: "other", hold: Hold{Refuse: "no", WithholdStart: true}, through: all},
		{
			name: "start withheld", uid: "uid", hold: Hold{WithholdStart: true},
			through: []string{"create", "stop", "remove", "stop sandbox", "remove sandbox", "execsync", "exec", "attach", "portforward"},
		},
		{
			name: "refused", uid: "uid", hold: Hold{Refuse: "the pod is frozen"},
			through: []string{"stop", "remove", "stop sandbox", "remove sandbox"},
			errs: map[string]string{
				"create": "frozen", "start": "frozen", "execsync": "frozen", "exec": "frozen", "attach": "frozen", "portforward": "frozen",
			},
		},
		{
			name: "stop forbidden", uid: "uid", hold: Hold{BeforeStop: func(context.Context) error { return forbidden }},
			through: []string{"create", "start", "execsync", "exec", "attach", "portforward"},
			errs: map[string]string{
				"stop": "given away", "remove": "given away", "stop sandbox": "given away", "remove sandbox": "given away",
			},
		},
		{name: "stop allowed", uid: "uid", hold: Hold{BeforeStop: func(context.Context) error { return nil }}, through: all},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := &recorder{}
			g := New()
			g.Ready()
			g.Set(tt.uid, tt.hold)
			errs := everything(t.Context(), g.Wrap(rec))
			if !slices.Equal(rec.calls, tt.through) {
				t.Errorf("calls that reached the runtime:\n got %q\nwant %q", rec.calls, tt.through)
			}
			for name, err := range errs {
				want, fails := tt.errs[name]
				if fails != (err != nil) || fails && !strings.Contains(err.Error(), want) {
					t.Errorf("%s: error %v, want one with %q", name, err, want)
				}
			}
		})
	}
}

func TestWithheldStartIsReported(t *testing.T) {
	g := New()
	g.Ready()
	var started []string
	g.Set("uid", Hold{WithholdStart: true, Started: func(_ context.Context, id string) error {
		started = append(started, id)
		return nil
	}})
	rec := &recorder{}
	if err := g.Wrap(rec).StartContainer(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(started, []string{"c"}) || len(rec.calls) != 0 {
		t.Errorf("reported %q, reached the runtime: %q", started, rec.calls)
	}
	g.Release("uid")
	if err := g.Wrap(rec).StartContainer(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(rec.calls, []string{"start"}) {
		t.Errorf("after the release the start did not reach the runtime: %q", rec.calls)
	}
}

func TestLater(t *testing.T) {
	g := New()
	said := 0
	say := func() { said++ }
	g.Set("frozen", Hold{Refuse: "frozen"})
	for _, uid := range []string{"unknown", "frozen"} {
		if g.Later(uid, say) {
			t.Errorf("pod %s is not one whose starts are withheld", uid)
		}
	}
	for _, uid := range []string{"admitted", "released"} {
		g.Set(uid, Hold{WithholdStart: true})
		if !g.Later(uid, say) || !g.Later(uid, say) || said != 0 {
			t.Errorf("pod %s: said %d times before it was clear", uid, said)
		}
	}
	g.Release("released")
	g.Admit("released")
	if said != 0 {
		t.Errorf("said %d times of a pod that was released", said)
	}
	g.Admit("admitted")
	g.Admit("admitted")
	if said != 2 {
		t.Errorf("said %d times, not twice, of a pod that was admitted", said)
	}
	if _, held := g.Held("admitted"); held {
		t.Error("the pod is still held")
	}
}

func TestNothingHappensBeforeTheJournalWasRead(t *testing.T) {
	g := New()
	rec := &recorder{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, err := range everything(ctx, g.Wrap(rec)) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, want it to wait until the context ends", name, err)
		}
	}
	if len(rec.calls) != 0 {
		t.Errorf("reached the runtime: %q", rec.calls)
	}
}
