package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// PIDs lists the processes in path and below, as the caller's PID namespace numbers them.
func (l Layout) PIDs(path string) ([]int, error) {
	seen := map[int]bool{}
	var pids []int
	for _, hierarchy := range l.Hierarchies {
		folders, err := hierarchy.folders(path)
		if err != nil {
			return nil, fmt.Errorf("list control groups: %w", err)
		}
		for _, folder := range folders {
			content, err := os.ReadFile(filepath.Join(folder, "cgroup.procs"))
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list processes: %w", err)
			}
			scanner := bufio.NewScanner(bytes.NewReader(content))
			for scanner.Scan() {
				pid, err := strconv.Atoi(scanner.Text())
				// Zero stands for a process that this namespace cannot see.
				if err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids, nil
}

// Kill ends every process in path and below and returns when all are gone. Frozen groups are thawed, since a frozen process
// of version 1 cannot die.
func (l Layout) Kill(ctx context.Context, path string) error {
	for {
		pids, err := l.PIDs(path)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return nil
		}
		watched, err := watch(pids)
		if err != nil {
			return err
		}
		// Killed before thawed: a process that wakes up must find its end waiting, or it would run for a moment.
		for pid, fd := range watched {
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				closeAll(watched)
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		l.thaw(path)
		err = waitAll(ctx, watched)
		closeAll(watched)
		if err != nil {
			return err
		}
	}
}

func (l Layout) thaw(path string) {
	for _, hierarchy := range l.Hierarchies {
		folders, err := hierarchy.folders(path)
		if err != nil {
			continue
		}
		for _, folder := range folders {
			// Only the freezer's tree has these files; elsewhere opening them fails, which is right.
			writeExisting(filepath.Join(folder, "freezer.state"), "THAWED")
			writeExisting(filepath.Join(folder, "cgroup.freeze"), "0")
		}
	}
}

func writeExisting(name, value string) {
	file, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer file.Close()
	_, _ = file.WriteString(value)
}

func watch(pids []int) (map[int]int, error) {
	watched := map[int]int{}
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			closeAll(watched)
			return nil, fmt.Errorf("watch process %d: %w", pid, err)
		}
		watched[pid] = fd
	}
	return watched, nil
}

func closeAll(watched map[int]int) {
	for _, fd := range watched {
		unix.Close(fd)
	}
}

func waitAll(ctx context.Context, watched map[int]int) error {
	for pid, fd := range watched {
		for {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("process %d does not end: %w", pid, err)
			}
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for process %d: %w", pid, err)
			}
			if n > 0 {
				break
			}
		}
	}
	return nil
}

// Remove deletes path and everything below it in every hierarchy. The processes must have ended; the kernel lets go of the
// last ones a moment later, which is waited for until the context ends.
func (l Layout) Remove(ctx context.Context, path string) error {
	for _, hierarchy := range l.Hierarchies {
		for {
			err := hierarchy.remove(path)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("remove control group: %w", err)
			}
			// There is no event for "a dead process was accounted for".
			select {
			case <-ctx.Done():
				return fmt.Errorf("remove control group: %w", err)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil
}

func (h Hierarchy) remove(path string) error {
	folders, err := h.folders(path)
	if err != nil {
		return err
	}
	for _, folder := range folders {
		if err := unix.Rmdir(folder); err != nil && !errors.Is(err, unix.ENOENT) {
			return &os.PathError{Op: "rmdir", Path: folder, Err: err}
		}
	}
	return nil
}
