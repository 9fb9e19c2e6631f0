package migrate

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// TestMain: the fake client lists and watches, but knows no watch that begins with a list.
func TestMain(m *testing.M) {
	os.Setenv("KUBE_FEATURE_WatchListClient", "false")
	os.Exit(m.Run())
}

func newClient(t *testing.T, objects ...client.Object) client.WithWatch {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1alpha1.AddToScheme, corev1.AddToScheme, policyv1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	return fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithStatusSubresource(&v1alpha1.PodMigration{}).
		WithIndex(&v1alpha1.PodMigration{}, "metadata.name", func(o client.Object) []string { return []string{o.GetName()} }).
		WithIndex(&corev1.Pod{}, "spec.nodeName", func(o client.Object) []string { return []string{o.(*corev1.Pod).Spec.NodeName} }).Build()
}

func migration(name string, phase v1alpha1.Phase) *v1alpha1.PodMigration {
	m := &v1alpha1.PodMigration{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "1"}, Spec: v1alpha1.PodMigrationSpec{PodName: "redis"}}
	m.Status.Phase = phase
	return m
}

// The codes are part of the interface.
func TestCodes(t *testing.T) {
	for phase, code := range map[v1alpha1.Phase]int{
		v1alpha1.PhaseRefused: 3, v1alpha1.PhaseRolledBack: 4, v1alpha1.PhaseFailed: 5, v1alpha1.PhaseCancelled: 6,
	} {
		err := &EndedError{Pod: "redis", Phase: phase, Reason: "Because", Message: "Of that."}
		if err.Code() != code || !strings.Contains(err.Error(), "Because: Of that.") {
			t.Errorf("%s: code %d, %s", phase, err.Code(), err)
		}
	}
}

func TestFollow(t *testing.T) {
	// The fake client does not repeat what happens between a list and the watch after it.
	watching := make(chan struct{})
	c := interceptor.NewClient(newClient(t, migration("redis-1", "")), interceptor.Funcs{
		Watch: func(ctx context.Context, c client.WithWatch, l client.ObjectList, o ...client.ListOption) (watch.Interface, error) {
			defer close(watching)
			return c.Watch(ctx, l, o...)
		},
	})
	var text bytes.Buffer
	o := &options{pod: "redis", errOut: &text, out: &text}
	type result struct {
		m   *v1alpha1.PodMigration
		err error
	}
	done := make(chan result, 1)
	m := migration("redis-1", "")
	go func() {
		m, err := o.follow(t.Context(), c, m)
		done <- result{m, err}
	}()
	<-watching
	for _, phase := range []v1alpha1.Phase{v1alpha1.PhaseScheduling, v1alpha1.PhaseScheduling, v1alpha1.PhaseRestoring, v1alpha1.PhaseSucceeded} {
		now := &v1alpha1.PodMigration{}
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(m), now); err != nil {
			t.Fatal(err)
		}
		now.Status.Phase = phase
		if err := c.Status().Update(t.Context(), now); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case r := <-done:
		if r.err != nil || r.m.Status.Phase != v1alpha1.PhaseSucceeded {
			t.Errorf("%v, %v", r.m, r.err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
	if !strings.Contains(text.String(), "Succeeded") || strings.Count(text.String(), "Scheduling") > 1 {
		t.Errorf("it said:\n%s", text.String())
	}
}

func TestCancelAll(t *testing.T) {
	other := migration("nginx-1", v1alpha1.PhasePending)
	other.Spec.PodName = "nginx"
	c := newClient(t, migration("redis-1", v1alpha1.PhaseSucceeded), migration("redis-2", v1alpha1.PhasePending), other)
	var text bytes.Buffer
	o := &options{pod: "redis", errOut: &text, out: &text}
	if err := o.cancelAll(t.Context(), c, "default"); err != nil {
		t.Fatal(err)
	}
	var all v1alpha1.PodMigrationList
	if err := c.List(t.Context(), &all); err != nil || len(all.Items) != 2 {
		t.Errorf("%d migrations are left, %v", len(all.Items), err)
	}
	if !strings.Contains(text.String(), "redis-2 cancelled") {
		t.Errorf("it said %q", text.String())
	}
	if err := o.cancelAll(t.Context(), c, "default"); err == nil || !strings.Contains(err.Error(), "no migration of pod redis") {
		t.Errorf("a second time: %v", err)
	}
}

func TestArguments(t *testing.T) {
	for _, tt := range []struct{ args, text string }{
		{"", "accepts between 1 and 2 arg(s)"},
		{"redis node1 --node-selector a=b", "not both"},
		{"redis --timeout 10ms", "a second or more"},
		{"redis -o table", "name, json, yaml, wide"},
		{"redis --dry-run=client", "give server or none"},
		{"redis --freeze-budget 10us", "a millisecond or more"},
		{"redis --on-failure Retry", "give RunOn or Evict"},
		{"--from node1 --dry-run=server", "for one pod"},
		{"redis --wait=false --dry-run=server", "leave out --from, --no-wait"},
		{"redis --from node1", "give a pod or --from"},
		{"--from node1 --to node1", "name another node"},
		{"redis node1 --to node2", "not both"},
		{"redis --to node2 --node-selector a=b", "not both"},
		{"redis --selector a=b", "need --from"},
		{"redis --no-cordon", "need --from"},
	} {
		cmd := Command(&bytes.Buffer{}, &bytes.Buffer{})
		cmd.SetArgs(strings.Fields(tt.args))
		err := cmd.ExecuteContext(t.Context())
		var ended *EndedError
		if err == nil || errors.As(err, &ended) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v", tt.args, err)
		}
	}
}

func TestOutput(t *testing.T) {
	for _, tt := range []struct {
		output string
		want   []string
	}{
		{"", []string{"pod/redis-1abc\n"}},
		{"name", []string{"podmigration.podmig.dev/redis-1\n"}},
		{"json", []string{`"kind": "PodMigration"`, `"clonePodName": "redis-1abc"`}},
		{"yaml", []string{"kind: PodMigration\n", "clonePodName: redis-1abc\n"}},
		{"wide", []string{
			"POD     RESULT      SOURCE   TARGET   CLONE        MIGRATION   TOOK   REASON   MESSAGE\n",
			"redis   Succeeded   node1    node2    redis-1abc   redis-1     1.5s   Cloned   It has taken over.\n",
		}},
	} {
		m := migration("redis-1", v1alpha1.PhaseSucceeded)
		began := metav1.NewMicroTime(time.Unix(1, 0))
		m.Status.PhaseTransitions = []v1alpha1.PhaseTransition{{Phase: v1alpha1.PhaseScheduling, Time: began}, {Phase: v1alpha1.PhaseSucceeded, Time: metav1.NewMicroTime(began.Add(1500 * time.Millisecond))}}
		m.Status.SourceNode, m.Status.TargetNode, m.Status.ClonePodName, m.Status.Reason, m.Status.Message = "node1", "node2", "redis-1abc", "Cloned", "It has taken over."
		var out bytes.Buffer
		if err := (&options{output: tt.output, out: &out}).print(m, "pod/redis-1abc"); err != nil {
			t.Errorf("%s: %v", tt.output, err)
		}
		for _, want := range tt.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: it printed\n%s", tt.output, &out)
			}
		}
	}
}

func TestMeter(t *testing.T) {
	var r meter
	frozen := int64(139)
	for _, tt := range []struct {
		phase  v1alpha1.Phase
		bytes  int64
		at     int64
		frozen *int64
		want   string
	}{
		{v1alpha1.PhasePreparing, 0, 1, nil, ""},
		{v1alpha1.PhaseTransferring, 300 << 10, 2, nil, "(300 KiB)"},
		{v1alpha1.PhaseTransferring, 100<<20 + 300<<10, 4, nil, "(100 MiB, 50 MiB/s, to be frozen for 70 ms and what the restore takes)"},
		// Nothing new is not a rate of zero.
		{v1alpha1.PhaseTransferring, 100<<20 + 300<<10, 5, nil, "(100 MiB)"},
		{v1alpha1.PhaseSucceeded, 120 << 20, 6, &frozen, "(120 MiB, frozen for 139 ms)"},
	} {
		m := &v1alpha1.PodMigration{Status: v1alpha1.PodMigrationStatus{Phase: tt.phase, TransferredBytes: tt.bytes, FrozenMilliseconds: tt.frozen}}
		if tt.at == 4 {
			expected := int64(70)
			m.Status.ExpectedFreezeMilliseconds = &expected
		}
		if got := r.read(m, time.Unix(tt.at, 0)); got != tt.want {
			t.Errorf("%d bytes: %q, want %q", tt.bytes, got, tt.want)
		}
	}
}
