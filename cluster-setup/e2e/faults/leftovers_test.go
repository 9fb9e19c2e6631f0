//go:build e2e

package faults

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"podmig.dev/podmig/cluster-setup/supervisor"
)

// looks prints what there is on a node, each line with its kind. The last line shows
// that it ran to its end.
const looks = `
list() { while read -r x; do echo "$1 $x"; done; }
cut -d' ' -f2 /proc/mounts | list mount
find /sys/fs/cgroup -type d | grep -vE "/kubepods(/besteffort|/burstable)?$" | list cgroup
find /sys/fs/cgroup -name freezer.state 2>/dev/null | while read -r f; do s=$(cat $f 2>/dev/null); [ "$s" = THAWED ] || [ -z "$s" ] || echo frozen $f; done
find /sys/fs/cgroup -name cgroup.freeze 2>/dev/null | while read -r f; do s=$(cat $f 2>/dev/null); [ "$s" != 1 ] || echo frozen $f; done
for p in /proc/[0-9]*; do c=$(cat $p/comm 2>/dev/null); case "$c" in ''|sh|cat|find|cut|ctr|ip|nft|runc|iptables*|ip6tables*|xtables*|loopback|bridge|host-local|portmap|ptp) ;; *) echo process $c;; esac; done
ls /run/netns | list netns
ls /sys/class/net | list interface
nft list tables | list rules
find /var/lib/kubelet/migrations -type f ! -name '.*' 2>/dev/null | list record
find /run/containerd/io.containerd.grpc.v1.podmig-migration -mindepth 2 | list session
find /run/containerd/io.containerd.runtime.v2.task /run/containerd/runc -mindepth 2 -maxdepth 2 2>/dev/null | list task
find /var/lib/kubelet/pods -mindepth 1 -maxdepth 1 | list pod
find /var/lib/cni/networks -type f -name '[0-9]*' | list address
find /run/podmig-faults /dev/shm /tmp -mindepth 1 | list temporary
echo end`

// look counts what there is on a node.
func look(ctx context.Context, node string) (map[string]int, error) {
	var out, errs bytes.Buffer
	err := admin.Cluster.Run(ctx, node, supervisor.Command{Args: []string{"sh", "-c", looks}, Stdout: &out, Stderr: &errs})
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w: %s", node, err, errs.String())
	}
	found := map[string]int{}
	for line := range strings.SplitSeq(strings.TrimSpace(out.String()), "\n") {
		found[line]++
	}
	if found["end"] != 1 {
		return nil, fmt.Errorf("look at %s: it did not run to its end", node)
	}
	return found, nil
}

// lookTwice looks until a node is twice the same: a program that is just being started has
// the name of who starts it.
func lookTwice(ctx context.Context, node string) (map[string]int, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var before map[string]int
	for {
		now, err := look(ctx, node)
		if err != nil || maps.Equal(now, before) {
			return now, err
		}
		before = now
	}
}

// clean waits until a node looks as it did before the first test.
func clean(ctx context.Context, t *testing.T, node string) {
	t.Helper()
	var differs, first []string
	var now map[string]int
	begin := time.Now()
	for ctx.Err() == nil {
		seen, err := look(ctx, node)
		if err != nil && ctx.Err() != nil && now != nil {
			// The time is up; what was seen before counts.
			break
		}
		if err != nil {
			t.Error(err)
			return
		}
		now, differs = seen, nil
		for _, line := range slices.Sorted(maps.Keys(now)) {
			if more := now[line] - baseline[node][line]; more > 0 {
				differs = append(differs, fmt.Sprintf("%d more: %s", more, line))
			}
		}
		for _, line := range slices.Sorted(maps.Keys(baseline[node])) {
			if less := baseline[node][line] - now[line]; less > 0 {
				differs = append(differs, fmt.Sprintf("%d less: %s", less, line))
			}
		}
		if len(differs) == 0 {
			if took := time.Since(begin); took > limit/2 {
				t.Logf("%s was clean only after %.0fs; there was at first:\n%s", node, took.Seconds(), strings.Join(first, "\n"))
			}
			return
		}
		if first == nil {
			first = differs
		}
		// Nothing tells when the kubelet has forgotten a pod.
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
	t.Errorf("left on %s:\n%s", node, strings.Join(differs, "\n"))
	// It is told once, not by every scenario that comes after.
	if now != nil {
		baseline[node] = now
	}
}
