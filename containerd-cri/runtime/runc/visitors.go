package runc

import (
	"bufio"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// Visitors are processes that exec has brought into a container. CRIU can not dump
// them, because their parents are outside. Those of probes come every second and end
// by themselves; only one that stays is a reason to refuse.
const (
	// visitPreflight is how long the preflight waits for a visitor to end.
	visitPreflight = 3 * time.Second
	// visitFreeze is how long a freeze waits; the kubelet has stopped the probes by then.
	visitFreeze = 2 * time.Second
)

// visitor tells whether a process of a container is one, by the number of its parent.
func visitor(c runtime.Container, pids []int, pid, parent int) bool {
	return pid != c.Pid && parent > 0 && !slices.Contains(pids, parent)
}

// visitors returns the visitors of a container.
func (g cgroups) visitors(c runtime.Container, f freezer) ([]int, error) {
	pids, err := f.pids()
	if err != nil {
		return nil, err
	}
	var out []int
	for _, pid := range pids {
		if visitor(c, pids, pid, g.parentOf(pid)) {
			out = append(out, pid)
		}
	}
	return out, nil
}

// parentOf returns 0 for a process that has ended.
func (g cgroups) parentOf(pid int) int {
	f, err := os.Open(filepath.Join(g.procDir(), strconv.Itoa(pid), "status"))
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "PPid:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}

// awaitEnd waits until processes have ended, and returns those that have not when the
// time is over.
func awaitEnd(ctx context.Context, pids []int, limit time.Duration) []int {
	deadline := time.Now().Add(limit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	var stay []int
	for _, pid := range pids {
		if !ends(ctx, pid, deadline) {
			stay = append(stay, pid)
		}
	}
	return stay
}

// ends waits for the end of one process until a deadline.
func ends(ctx context.Context, pid int, deadline time.Time) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	defer unix.Close(fd)
	for {
		left := max(time.Until(deadline), 0)
		// In steps, to see the end of the context.
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(min(left, 100*time.Millisecond).Milliseconds()))
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) || left == 0 || ctx.Err() != nil {
			return false
		}
	}
}

// awaitVisitors waits, before a freeze, for visitors to end. Those that stay are left
// to CRIU, which names them.
func (r *Runtime) awaitVisitors(ctx context.Context, cs []runtime.Container, own []freezer) {
	var all []int
	for i, c := range cs {
		if frozen, err := own[i].frozen(); err != nil || frozen {
			return
		}
		pids, err := r.cgroups.visitors(c, own[i])
		if err != nil {
			return
		}
		all = append(all, pids...)
	}
	awaitEnd(ctx, all, visitFreeze)
}
