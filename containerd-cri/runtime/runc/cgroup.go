package runc

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// cgroups finds the freezer of processes. The zero value works on the real system.
type cgroups struct {
	proc string // default /proc
	sys  string // default /sys/fs/cgroup
}

func (g cgroups) procDir() string { return orDefault(g.proc, "/proc") }
func (g cgroups) sysDir() string  { return orDefault(g.sys, "/sys/fs/cgroup") }

func orDefault(s, d string) string {
	if s == "" {
		return d
	}
	return s
}

// mode is "v1", "hybrid" or "v2".
func (g cgroups) mode() string {
	if _, err := os.Stat(filepath.Join(g.sysDir(), "cgroup.controllers")); err == nil {
		return "v2"
	}
	if _, err := os.Stat(filepath.Join(g.sysDir(), "unified", "cgroup.procs")); err == nil {
		return "hybrid"
	}
	return "v1"
}

// freezer is the directory of a control group that can be frozen.
type freezer struct {
	dir string
	v2  bool
}

// of returns the freezer of a container.
func (g cgroups) of(c runtime.Container) (freezer, error) {
	b, err := os.ReadFile(filepath.Join(g.procDir(), strconv.Itoa(c.Pid), "cgroup"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return freezer{}, fmt.Errorf("process %d: %w", c.Pid, runtime.ErrGone)
	} else if err != nil {
		return freezer{}, err
	}
	unified := ""
	for line := range strings.SplitSeq(strings.TrimSpace(string(b)), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 {
			continue
		}
		for controller := range strings.SplitSeq(f[1], ",") {
			if controller == "freezer" {
				group, err := ownGroup(f[2], c)
				return freezer{dir: filepath.Join(g.sysDir(), "freezer", group)}, err
			}
		}
		if f[0] == "0" && f[1] == "" {
			unified = f[2]
		}
	}
	if unified == "" {
		return freezer{}, fmt.Errorf("process %d is in no control group that can be frozen", c.Pid)
	}
	root := g.sysDir()
	if g.mode() != "v2" {
		root = filepath.Join(root, "unified")
	}
	group, err := ownGroup(unified, c)
	return freezer{dir: filepath.Join(root, group), v2: true}, err
}

// ownGroup returns the group of the container when a process of it is in that group
// or below. Its name contains the ID of the container with every cgroup driver; a
// process elsewhere has inherited the number of a container that is gone.
func ownGroup(group string, c runtime.Container) (string, error) {
	path := ""
	for elem := range strings.SplitSeq(strings.TrimPrefix(group, "/"), "/") {
		if elem == ".." {
			break
		}
		path += "/" + elem
		if strings.Contains(elem, c.ID) && c.ID != "" {
			return path, nil
		}
	}
	return "", fmt.Errorf("process %d is in control group %s, which is not that of container %s: %w", c.Pid, group, c.ID, runtime.ErrGone)
}

func (f freezer) parent() freezer { return freezer{dir: filepath.Dir(f.dir), v2: f.v2} }

func (f freezer) set(frozen bool) error {
	file, val := "freezer.state", "THAWED"
	if f.v2 {
		file, val = "cgroup.freeze", "0"
	}
	if frozen {
		val = "FROZEN"
		if f.v2 {
			val = "1"
		}
	}
	err := os.WriteFile(filepath.Join(f.dir, file), []byte(val), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control group %s: %w", f.dir, runtime.ErrGone)
	}
	return err
}

// frozen tells whether all processes of the group have stopped.
func (f freezer) frozen() (bool, error) {
	if !f.v2 {
		b, err := os.ReadFile(filepath.Join(f.dir, "freezer.state"))
		if errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("control group %s: %w", f.dir, runtime.ErrGone)
		}
		return string(bytes.TrimSpace(b)) == "FROZEN", err
	}
	b, err := os.ReadFile(filepath.Join(f.dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("control group %s: %w", f.dir, runtime.ErrGone)
	}
	return strings.Contains(string(b), "frozen 1"), err
}

// await waits until the group is frozen. Version 1 has no event for it, and the
// first look nearly always succeeds, so this looks again at growing intervals.
// Version 1 also wants FROZEN written again while tasks fork or wait.
func (f freezer) await(ctx context.Context) error {
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		ok, err := f.frozen()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("control group %s does not freeze, a process may hang in the kernel: %w", f.dir, ctx.Err())
		case <-time.After(pause):
		}
		if !f.v2 {
			if err := f.set(true); err != nil {
				return err
			}
		}
	}
}

// pids returns the processes of the group and of the groups below it.
func (f freezer) pids() ([]int, error) {
	var out []int
	err := filepath.WalkDir(f.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		file, err := os.Open(filepath.Join(p, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		defer file.Close()
		for s := bufio.NewScanner(file); s.Scan(); {
			if n, err := strconv.Atoi(s.Text()); err == nil && n > 0 {
				out = append(out, n)
			}
		}
		return nil
	})
	return out, err
}

// Freeze implements runtime.Runtime. The common parent of the containers is
// frozen first, which stops all of them at one instant; then every container, and
// the parent is released again, because CRIU has to thaw one container at a time.
func (r *Runtime) Freeze(ctx context.Context, cs []runtime.Container) (err error) {
	var own []freezer
	for _, c := range cs {
		f, err := r.cgroups.of(c)
		if err != nil {
			return fmt.Errorf("container %s: %w", c.Name, err)
		}
		own = append(own, f)
	}
	r.awaitVisitors(ctx, cs, own)
	defer func() {
		if err != nil {
			for _, f := range own {
				_ = f.set(false)
			}
		}
	}()
	if len(own) > 1 {
		parent := own[0].parent()
		for _, f := range own[1:] {
			if f.parent() != parent {
				return fmt.Errorf("the containers of the pod are not in one control group (%s, %s), so they can not be frozen at one instant", own[0].dir, f.dir)
			}
		}
		if _, err := os.Stat(filepath.Join(parent.dir, "freezer.state")); !parent.v2 && err != nil {
			// The root group of version 1 has no state: nobody may freeze the node.
			return fmt.Errorf("the containers have no control group of their own pod: %w", err)
		}
		defer func() {
			if terr := parent.set(false); terr != nil && err == nil {
				err = fmt.Errorf("thaw the pod's control group: %w", terr)
			}
		}()
		if err := parent.set(true); err != nil {
			return fmt.Errorf("freeze the pod: %w", err)
		}
		if err := parent.await(ctx); err != nil {
			return err
		}
	}
	for i, f := range own {
		if err := f.set(true); err != nil {
			return fmt.Errorf("freeze container %s: %w", cs[i].Name, err)
		}
		if err := f.await(ctx); err != nil {
			return fmt.Errorf("freeze container %s: %w", cs[i].Name, err)
		}
	}
	return nil
}

// Frozen implements runtime.Runtime.
func (r *Runtime) Frozen(_ context.Context, c runtime.Container) (bool, error) {
	f, err := r.cgroups.of(c)
	if err != nil {
		return false, err
	}
	return f.frozen()
}

// Thaw implements runtime.Runtime.
func (r *Runtime) Thaw(_ context.Context, cs []runtime.Container) error {
	var errs []error
	for _, c := range cs {
		f, err := r.cgroups.of(c)
		if err == nil {
			err = f.set(false)
		}
		if err != nil && !errors.Is(err, runtime.ErrGone) {
			errs = append(errs, fmt.Errorf("thaw container %s: %w", c.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Kill implements runtime.Runtime. SIGKILL is pending before the processes thaw,
// and the kernel acts on it before a process returns to user space.
func (r *Runtime) Kill(ctx context.Context, cs []runtime.Container) error {
	var errs []error
	for _, c := range cs {
		if err := r.kill(ctx, c); err != nil && !errors.Is(err, runtime.ErrGone) {
			errs = append(errs, fmt.Errorf("kill container %s: %w", c.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (r *Runtime) kill(ctx context.Context, c runtime.Container) error {
	f, err := r.cgroups.of(c)
	if err != nil {
		return err
	}
	init, err := unix.PidfdOpen(c.Pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return runtime.ErrGone
	} else if err != nil {
		return err
	}
	defer unix.Close(init)
	// Freezing first makes the list of processes complete: nobody forks.
	if err := f.set(true); err != nil {
		return err
	}
	if err := f.await(ctx); err != nil {
		return err
	}
	pids, err := f.pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("process %d: %w", pid, err)
		}
	}
	if err := f.set(false); err != nil {
		return err
	}
	return awaitExit(ctx, init)
}

// awaitExit waits for the end of a process through its pidfd.
func awaitExit(ctx context.Context, pidfd int) error {
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("the process did not end: %w", err)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if n == 1 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// KillAll ends every process in the control groups of a container, also when its
// first process is not known, and returns when there is none.
func KillAll(ctx context.Context, id string) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		pids, err := processesOf(id)
		if len(pids) == 0 || err != nil {
			return err
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v of container %s do not end: %w", pids, id, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// processesOf finds the processes in control groups with the name of a container.
func processesOf(id string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cgroup"))
		if err != nil || !bytes.Contains(b, []byte(id)) {
			continue
		}
		// A zombie keeps its groups until its parent asks for it.
		if stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat")); err == nil {
			if i := bytes.LastIndexByte(stat, ')'); i > 0 && bytes.HasPrefix(stat[i:], []byte(") Z")) {
				continue
			}
		}
		out = append(out, pid)
	}
	return out, nil
}
