//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/kubelet/wire"
	"podmig.dev/podmig/tools/clone"
)

// probedPod is a counter that is restarted at once when it does not answer.
var probedPod = counterPod("") + `    livenessProbe: {httpGet: {path: /status, port: 8080}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1}
`

// A frozen source is left alone: nobody gets into it, each with an error that says why
// and where to go, its probes are neither run nor counted, and a thaw puts everything
// back. The test is the target, so it is frozen for as long as it takes to see that.
func TestFrozenSourceIsLeftAlone(t *testing.T) {
	ctx, k := begin(t, 90*time.Second)
	const node3 = "node3"
	p := start(ctx, t, k, "counter-0", probedPod)
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	nodeThatMoves(ctx, t, k, node3)
	o := clone.Options{Name: p.Name + "-clone", Node: node3}
	if err := k.Clone(ctx, p.Name, o, bindTo(node3)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		// No kubelet will say that it is gone.
		if _, err := k.Kubectl(ctx, "delete", "pod", o.Name, "--grace-period=0", "--force"); err != nil {
			t.Error(err)
		}
	})
	c, err := k.Pod(ctx, o.Name)
	if err != nil {
		t.Fatal(err)
	}
	s := wire.Session{Namespace: k.Namespace, Pod: p.Name, ID: string(c.UID)}
	target := asPeer(ctx, t, node1, issue(t, "system:node:"+node3, "system:nodes"))
	until(ctx, t, "the session is open", func() error { _, err := target.Open(ctx, s, openRequest(p, node3)); return err })
	stream, err := target.Stream(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	drained := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, stream)
		drained <- err
	}()
	// Times of events are whole seconds, and while it started it may have been unready: the freeze is in a
	// later second than that.
	until(ctx, t, "the second in which it became ready is over", func() error {
		if ready := kit.Condition(p, string(v1.PodReady)).LastTransitionTime; !time.Now().Truncate(time.Second).After(ready.Time) {
			return fmt.Errorf("it became ready at %s", ready)
		}
		return nil
	})
	if _, err := target.Freeze(ctx, s, &wire.FreezeRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	frozen := time.Now()

	why := "the pod is frozen for its migration to pod " + o.Name + " on node " + node3
	for name, args := range map[string][]string{
		"exec":         {"exec", p.Name, "--", "true"},
		"attach":       {"attach", p.Name},
		"port-forward": {"port-forward", p.Name, ":8080"},
	} {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		out, err := k.Kubectl(ctx, args...)
		cancel()
		if err == nil || !strings.Contains(out+err.Error(), why) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
	if out, err := k.Kubectl(ctx, "logs", p.Name); err != nil {
		t.Errorf("logs: %v: %s", err, out)
	}
	// The probes would have failed several times by then.
	select {
	case <-time.After(time.Until(frozen.Add(4 * time.Second))):
	case <-ctx.Done():
	}
	now, err := k.Pod(ctx, p.Name)
	if err != nil {
		t.Fatal(err)
	}
	if st := now.Status.ContainerStatuses[0]; now.Status.Phase != v1.PodRunning || st.RestartCount != 0 || !st.Ready {
		t.Errorf("after %s in which it was frozen the source is %s: %s", time.Since(frozen), now.Status.Phase, st.String())
	}

	if err := target.Abort(ctx, s, &wire.FailureRequest{Reason: "Cancelled", Message: "the test has seen enough"}); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "the source runs again", func() error {
		after, err := ask(ctx, "GET", p, 8080, "/status")
		if err == nil && !strings.Contains(after, strconv.Itoa(before.PID)) {
			err = errors.New(after)
		}
		return err
	})
	until(ctx, t, "the source may be entered again", func() error {
		// There is no such program: it is the runtime that says so.
		out, err := k.Exec(ctx, p.Name, "true")
		if err != nil && strings.Contains(out+err.Error(), "frozen") {
			return err
		}
		return nil
	})
	for _, e := range k.Events(ctx, p.Name) {
		if (e.Reason == "Unhealthy" || e.Reason == "Killing") && !e.LastTimestamp.Time.Before(frozen.Truncate(time.Second)) {
			t.Errorf("event %s: %s", e.Reason, e.Message)
		}
	}
	// The probes count again.
	p = move(ctx, t, k, p.Name, "counter-9", node2)
	if after := getJSON[counterState](ctx, t, p, 8080, "/status"); after.PID != before.PID || !after.Started.Equal(before.Started) {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// clockPod looks at its monotonic clock all the time. The file has, in seconds, the
// largest step, the smallest one, the last value and when that was by the wall clock.
const clockPod = `
apiVersion: v1
kind: Pod
metadata: {name: clock-0}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers:
  - name: python
    image: podmig.dev/python:v1
    imagePullPolicy: Never
    command: [python3, -c]
    args:
    - |
      import os, time
      last, largest, smallest, looked = time.monotonic(), 0.0, 1.0, 0.0
      while True:
          time.sleep(0.005)
          now = time.monotonic()
          largest, smallest, last = max(largest, now - last), min(smallest, now - last), now
          if now - looked > 0.1:
              looked = now
              with open("/tmp/clock.new", "w") as f: f.write("%f %f %f %f" % (largest, smallest, now, time.time()))
              os.rename("/tmp/clock.new", "/tmp/clock")
`

// The monotonic clock of a moved process goes on where it stood: neither back nor over
// the time of the move. All nodes run on one machine, whose clock would have gone on;
// so what the process sees is not the clock of a node.
func TestMonotonicClockDoesNotJump(t *testing.T) {
	ctx, k := begin(t, 2*time.Minute)
	p := start(ctx, t, k, "clock-0", clockPod)
	type clock struct{ largest, smallest, value, lag float64 }
	look := func(after float64) clock {
		t.Helper()
		var c clock
		until(ctx, t, "the clock was looked at", func() error {
			text, err := k.Exec(ctx, p.Name, "cat", "/tmp/clock")
			if err != nil {
				return err
			}
			f := strings.Fields(text)
			var wall float64
			for i, v := range []*float64{&c.largest, &c.smallest, &c.value, &wall} {
				if i >= len(f) {
					return fmt.Errorf("it says %q", f)
				}
				if *v, err = strconv.ParseFloat(f[i], 64); err != nil {
					return err
				}
			}
			var mono, real unix.Timespec
			if err := errors.Join(unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono), unix.ClockGettime(unix.CLOCK_REALTIME, &real)); err != nil {
				return err
			}
			host := float64(mono.Nano())/1e9 - (float64(real.Nano())/1e9 - wall)
			c.lag = host - c.value
			if c.value <= after {
				return fmt.Errorf("it still says %f", c.value)
			}
			return nil
		})
		return c
	}
	first := look(0)
	for i := 1; i <= 3; i++ {
		before := look(0)
		began := time.Now()
		p = move(ctx, t, k, p.Name, fmt.Sprintf("clock-%d", i), []string{node1, node2}[i%2])
		took := time.Since(began).Seconds()
		after := look(before.value)
		if after.smallest < 0 {
			t.Errorf("move %d: the clock went back by %fs", i, -after.smallest)
		}
		// The pod stands still for about 0.2 s. What is slow here are the processors.
		if after.largest > max(first.largest, 0.1)+0.1 && after.largest > took/2 {
			t.Errorf("move %d: the clock made a step of %fs", i, after.largest)
		}
		if grown := after.lag - before.lag; grown < 0.01 || grown > took {
			t.Errorf("move %d of %fs: the clock was %fs behind that of the machine, now %fs", i, took, before.lag, after.lag)
		}
	}
}
