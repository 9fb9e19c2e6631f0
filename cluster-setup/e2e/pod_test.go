//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/cluster-setup/kit"
)

// sequencePod has a container that ran to its end, a sidecar, and two containers, one
// of which fails when it is first started. The last three exchange numbers.
const sequencePod = `
apiVersion: v1
kind: Pod
metadata: {name: sequence-0}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: shared, emptyDir: {}}
  initContainers:
  - name: setup
    image: podmig.dev/sequence:v1
    imagePullPolicy: Never
    args: [append, /shared/setup, ran]
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: relay
    image: podmig.dev/sequence:v1
    imagePullPolicy: Never
    restartPolicy: Always
    env:
    - {name: SEQUENCE_NAME, value: relay}
    - {name: SEQUENCE_LISTEN, value: "127.0.0.1:9001"}
    - {name: SEQUENCE_STATUS, value: ":8001"}
    - {name: SEQUENCE_DIR, value: /shared}
    - {name: SEQUENCE_PEERS, value: "left=127.0.0.1:9002,right=127.0.0.1:9003"}
    volumeMounts: [{name: shared, mountPath: /shared}]
  containers:
  - name: left
    image: podmig.dev/sequence:v1
    imagePullPolicy: Never
    env:
    - {name: SEQUENCE_NAME, value: left}
    - {name: SEQUENCE_LISTEN, value: "127.0.0.1:9002"}
    - {name: SEQUENCE_STATUS, value: ":8002"}
    - {name: SEQUENCE_DIR, value: /shared}
    - {name: SEQUENCE_PEERS, value: "relay=127.0.0.1:9001,right=127.0.0.1:9003"}
    - {name: SEQUENCE_FAILED, value: /shared/failed}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    livenessProbe: {httpGet: {path: /healthz, port: 8002}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 5}
    readinessProbe: {httpGet: {path: /status, port: 8002}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 5}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: right
    image: podmig.dev/sequence:v1
    imagePullPolicy: Never
    env:
    - {name: SEQUENCE_NAME, value: right}
    - {name: SEQUENCE_LISTEN, value: "127.0.0.1:9003"}
    - {name: SEQUENCE_STATUS, value: ":8003"}
    - {name: SEQUENCE_DIR, value: /shared}
    - {name: SEQUENCE_PEERS, value: "relay=127.0.0.1:9001,left=127.0.0.1:9002"}
    lifecycle: {postStart: {exec: {command: [/sequence, append, /shared/hooks, ran]}}}
    volumeMounts: [{name: shared, mountPath: /shared}]
`

// ports of the three programs' status servers.
var sequencePorts = map[string]int{"relay": 8001, "left": 8002, "right": 8003}

type sequenceSeries struct {
	Last, Resent, Faults uint64
	Fault                string
}

type sequenceState struct {
	PID            int
	Host           string
	Started        time.Time
	Uptime         time.Duration
	Probes, Wrote  uint64
	Sent           map[string]uint64
	Received, Read map[string]sequenceSeries
}

// faults returns every way on which a number was missing or came twice. A move breaks
// each connection once, and its last number may be sent again.
func (s sequenceState) faults(moves int) (fs []string) {
	for way, all := range map[string]map[string]sequenceSeries{"connection": s.Received, "file": s.Read} {
		for _, from := range slices.Sorted(maps.Keys(all)) {
			if one := all[from]; one.Faults > 0 {
				fs = append(fs, fmt.Sprintf("%d faults on the %s from %s, the first is %s", one.Faults, way, from, one.Fault))
			}
			if all[from].Resent > uint64(moves) {
				fs = append(fs, fmt.Sprintf("%d numbers on the %s from %s were sent again", all[from].Resent, way, from))
			}
		}
	}
	return fs
}

// advanced tells whether numbers have gone all ways since before, which may be empty.
func (s sequenceState) advanced(before sequenceState) error {
	if s.Wrote <= before.Wrote {
		return fmt.Errorf("it wrote %d, before %d", s.Wrote, before.Wrote)
	}
	if len(s.Sent) != 2 || len(s.Received) != 2 || len(s.Read) != 2 {
		return fmt.Errorf("it knows %d, %d and %d of the others", len(s.Sent), len(s.Received), len(s.Read))
	}
	for name, n := range s.Sent {
		if n <= before.Sent[name] || s.Received[name].Last <= before.Received[name].Last || s.Read[name].Last <= before.Read[name].Last {
			return fmt.Errorf("numbers to and from %s: %+v, before %+v", name, s, before)
		}
	}
	return nil
}

// exchange waits until every container of the pod has sent and received since before.
func exchange(ctx context.Context, t *testing.T, p *v1.Pod, before map[string]sequenceState) map[string]sequenceState {
	t.Helper()
	now := make(map[string]sequenceState)
	for name, port := range sequencePorts {
		until(ctx, t, "numbers go between "+name+" and the others", func() error {
			s := getJSON[sequenceState](ctx, t, p, port, "/status")
			now[name] = s
			return s.advanced(before[name])
		})
	}
	return now
}

// containerStatuses returns those of all containers by name.
func containerStatuses(p *v1.Pod) map[string]v1.ContainerStatus {
	m := make(map[string]v1.ContainerStatus)
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		m[s.Name] = s
	}
	return m
}

func execIn(ctx context.Context, t *testing.T, k *kit.Kit, pod, container string, command ...string) string {
	t.Helper()
	out, err := k.Kubectl(ctx, append([]string{"exec", pod, "-c", container, "--"}, command...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// moves of the pod below.
const sequenceMoves = 20

// Three containers, one a sidecar, exchange numbers over localhost and a shared
// emptyDir all the time. After twenty moves none is missing and none came twice; what
// was done once was not done again; and the kubelet treats the containers like those
// it has started itself.
func TestPodOfThreeContainersMovesTwentyTimes(t *testing.T) {
	ctx, k := begin(t, 5*time.Minute)
	p := start(ctx, t, k, "sequence-0", sequencePod)
	first := containerStatuses(p)
	if n := first["left"].RestartCount; n != 1 {
		t.Fatalf("container left was restarted %d times, it fails once", n)
	}
	begun := exchange(ctx, t, p, nil)
	before := begun
	nodes := []string{node1, node2}
	for i := 1; i <= sequenceMoves; i++ {
		old := p.Name
		p = move(ctx, t, k, old, fmt.Sprintf("sequence-%d", i), nodes[i%2])
		now := exchange(ctx, t, p, before)
		statuses := containerStatuses(p)
		for name, s := range now {
			if fs := s.faults(i); len(fs) > 0 {
				t.Fatalf("move %d: container %s: %s", i, name, strings.Join(fs, "; "))
			}
			if !s.Started.Equal(begun[name].Started) || s.PID != begun[name].PID || s.Uptime < before[name].Uptime {
				t.Fatalf("move %d: container %s: process %d, started %s, up %s; before it %d, %s, %s", i, name,
					s.PID, s.Started, s.Uptime, begun[name].PID, begun[name].Started, before[name].Uptime)
			}
			was, is := first[name], statuses[name]
			if is.State.Running == nil || !is.State.Running.StartedAt.Equal(&was.State.Running.StartedAt) {
				t.Errorf("move %d: container %s is %s, before it was %s", i, name, is.State.String(), was.State.String())
			}
			if is.RestartCount != was.RestartCount {
				t.Errorf("move %d: container %s was restarted %d times, before the moves %d times", i, name, is.RestartCount, was.RestartCount)
			}
		}
		// However many connections it has, it is said once that the move closes them.
		var closed []string
		for _, e := range k.Events(ctx, p.Name) {
			if e.Reason == "EstablishedTCP" {
				closed = append(closed, e.Message)
			}
		}
		if len(closed) != 1 || !strings.Contains(closed[0], "TCP connections are established") {
			t.Errorf("move %d: events about connections: %q", i, closed)
		}
		until(ctx, t, "container left is probed", func() error {
			if n := getJSON[sequenceState](ctx, t, p, sequencePorts["left"], "/status").Probes; n <= before["left"].Probes {
				return fmt.Errorf("it was probed %d times, before the move %d times", n, before["left"].Probes)
			}
			return nil
		})
		before = now
		// It has no processes any more; that it goes is waited for in the end.
		if _, err := k.Kubectl(ctx, "delete", "pod", old, "--wait=false"); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}

	// What was done once.
	for _, file := range []string{"/shared/setup", "/shared/hooks"} {
		if s := execIn(ctx, t, k, p.Name, "left", "/sequence", "print", file); s != "ran" {
			t.Errorf("%s has the lines %q", file, s)
		}
	}
	if s := containerStatuses(p)["setup"]; s.RestartCount != 0 || s.State.Running != nil {
		t.Errorf("the init container is %s, restarted %d times", s.State.String(), s.RestartCount)
	}

	// What belongs to the pod that the process is in now.
	for name, want := range map[string]string{"NODE": p.Spec.NodeName, "POD": p.Name} {
		if s := execIn(ctx, t, k, p.Name, "left", "/sequence", "environment", name); s != want {
			t.Errorf("a new process has %s=%s, not %s", name, s, want)
		}
	}
	if s := execIn(ctx, t, k, p.Name, "left", "/sequence", "print", "/etc/hosts"); !strings.Contains(s, p.Status.PodIP) || !strings.Contains(s, p.Name) {
		t.Errorf("/etc/hosts has nothing about %s (%s):\n%s", p.Name, p.Status.PodIP, s)
	}

	// A probe that fails has the effect that it has in any pod.
	if _, err := ask(ctx, http.MethodPost, p, sequencePorts["left"], "/sick"); err != nil {
		t.Fatal(err)
	}
	p, err := k.WaitPod(ctx, p.Name, "restarted by its liveness probe", func(p *v1.Pod) (bool, error) {
		s := containerStatuses(p)["left"]
		return s.RestartCount == 2 && s.State.Running != nil && s.Ready, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := containerStatuses(p)["right"].RestartCount; n != 0 {
		t.Errorf("container right was restarted %d times", n)
	}
}
