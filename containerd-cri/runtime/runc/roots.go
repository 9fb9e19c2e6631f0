package runc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"

	"golang.org/x/sys/unix"
)

// A restore builds the mounts of the container in a directory of its own, which CRIU
// removes at the end. This is how its log names it (criu/mount.c).
var rootLine = regexp.MustCompile(`(?m)^\(\d+\.\d+\) mnt: \t+Will mount \d+ @ (/tmp/\.criu\.mntns\.[A-Za-z0-9]{6})/`)

// RemoveRoots removes what a restore that was killed has left of it. log is CRIU's log.
func RemoveRoots(log string) error {
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
	dir := string(m[1])
	// It is a mount of its own. EINVAL: CRIU came to the end of its mounts.
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s, which a restore has left: %w", dir, err)
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove %s, which a restore has left: %w", dir, err)
	}
	return nil
}
