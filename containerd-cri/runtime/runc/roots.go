package runc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// A restore builds the mounts of the container in a directory of its own, which CRIU
// removes at the end. This is how its log names it (criu/mount.c).
var rootLine = regexp.MustCompile(`(?m)^\(\d+\.\d+\) mnt: \t+Will mount \d+ @ (/tmp/\.criu\.mntns\.[A-Za-z0-9]{6})/`)

// RemoveRestore removes what a restore that did not come to its end has left of a
// container: processes, and mounts in directories of CRIU's and of the OCI runtime's.
// log is CRIU's log.
func RemoveRestore(ctx context.Context, ociRoot, id, log string) error {
	if err := KillAll(ctx, id); err != nil {
		return err
	}
	// The OCI runtime removes its directory itself unless it was killed.
	for {
		pids, err := ociProcesses("restore", id)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			break
		}
		if stay := awaitEnd(ctx, pids, removeTimeout); len(stay) > 0 {
			return fmt.Errorf("process %d of the OCI runtime still restores container %s: kill it if it hangs, the clean-up is tried again", stay[0], id)
		}
	}
	state := filepath.Join(ociRoot, id)
	if err := errors.Join(removeRoots(log), removeMount(filepath.Join(state, "criu-root"))); err != nil {
		return err
	}
	// With a file in it the container is known, and deleted like any other.
	if err := unix.Rmdir(state); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove the OCI runtime's state of container %s, which a restore has left: %w", id, err)
	}
	return nil
}

// removeTimeout is for how long an OCI runtime may clean up.
const removeTimeout = 10 * time.Second

// removeRoots removes what a restore that was killed has left of it. log is CRIU's log.
func removeRoots(log string) error {
	b, err := os.ReadFile(log)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mounts of the restore: %w", err)
	}
	m := rootLine.FindSubmatch(b)
	if m == nil {
		return nil
	}
	return removeMount(string(m[1]))
}

// removeMount removes a mount point that may be there, and its directory.
func removeMount(dir string) error {
	// EINVAL: it is not mounted any more.
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s, which a restore has left: %w", dir, err)
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove %s, which a restore has left: %w", dir, err)
	}
	return nil
}
