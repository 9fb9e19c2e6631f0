//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/tools/clone"
)

const redisPod = `
apiVersion: v1
kind: Pod
metadata: {name: redis-0, labels: {app: redis}}
spec:
  nodeName: node1
  containers:
  - name: redis
    image: podmig.dev/redis:v1
    imagePullPolicy: Never
    readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
    livenessProbe: {exec: {command: [redis-cli, ping]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}
`

// redis asks a redis in a pod.
type redis struct {
	k   *kit.Kit
	pod string
}

func (r redis) cli(ctx context.Context, t *testing.T, args ...string) string {
	t.Helper()
	out, err := r.k.Exec(ctx, r.pod, append([]string{"redis-cli"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

var info = regexp.MustCompile(`(?m)^(run_id|uptime_in_seconds):(\S+)\r?$`)

// server returns what redis says about its process.
func (r redis) server(ctx context.Context, t *testing.T) (runID string, uptime int) {
	t.Helper()
	for _, m := range info.FindAllStringSubmatch(r.cli(ctx, t, "info", "server"), -1) {
		if m[1] == "run_id" {
			runID = m[2]
		} else {
			uptime, _ = strconv.Atoi(m[2])
		}
	}
	if runID == "" {
		t.Fatal("redis does not tell its run_id")
	}
	return runID, uptime
}

const fill = `for i=1,1000000 do redis.call('set','key:'..i,'value:'..i) end return redis.call('dbsize')`

// sum over all values: one lost or changed value changes it.
const sum = `local s=0 for i=1,1000000 do local v=redis.call('get','key:'..i) if v~='value:'..i then return 'key '..i..' is '..tostring(v) end s=s+1 end return tostring(s)`

// A redis with a million keys moves to the other node and back, ten times.
func TestRedisMovesAndMovesBack(t *testing.T) {
	ctx, k := begin(t, 10*time.Minute)
	if err := k.Create(ctx, redisPod); err != nil {
		t.Fatal(err)
	}
	if _, err := k.WaitRunning(ctx, "redis-0"); err != nil {
		t.Fatal(err)
	}
	r := redis{k, "redis-0"}
	if n := r.cli(ctx, t, "eval", fill, "0"); n != "1000000" {
		t.Fatalf("redis has %s keys", n)
	}
	runID, uptime := r.server(ctx, t)
	first, err := k.Logs(ctx, "redis-0", "redis")
	if err != nil || !strings.Contains(first, "Ready to accept connections") {
		t.Fatalf("log before the move: %v\n%s", err, first)
	}
	nodes := []string{node1, node2}
	for i := 1; i <= 10; i++ {
		name := fmt.Sprintf("redis-%d", i)
		p, err := k.Move(ctx, r.pod, clone.Options{Name: name, Node: nodes[i%2]})
		if err != nil {
			t.Fatalf("move %d: %v", i, err)
		}
		if p, err = k.WaitRunning(ctx, name); err != nil {
			t.Fatalf("move %d: %v", i, err)
		}
		if p.Spec.NodeName != nodes[i%2] {
			t.Fatalf("move %d: the clone is on %s", i, p.Spec.NodeName)
		}
		if n := p.Status.ContainerStatuses[0].RestartCount; n != 0 {
			t.Errorf("move %d: restart count %d", i, n)
		}
		if err := k.Delete(ctx, r.pod); err != nil {
			t.Fatalf("move %d: %v", i, err)
		}
		r.pod = name
		id, up := r.server(ctx, t)
		if id != runID || up < uptime {
			t.Fatalf("move %d: run_id %s uptime %d, before it %s and %d", i, id, up, runID, uptime)
		}
		uptime = up
		if got := r.cli(ctx, t, "eval", sum, "0"); got != "1000000" {
			t.Fatalf("move %d: %s", i, got)
		}
		after, err := k.Logs(ctx, name, "redis")
		if err != nil || !strings.HasPrefix(after, first) {
			t.Fatalf("move %d: the log has lost lines: %v\n%s", i, err, after)
		}
	}
	// A line from after the move stands below those from before.
	r.cli(ctx, t, "bgsave")
	deadline := time.Now().Add(20 * time.Second)
	for {
		after, err := k.Logs(ctx, r.pod, "redis")
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(after, first) && strings.Contains(after[len(first):], "Background saving") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no new line in the log:\n%s", after)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
