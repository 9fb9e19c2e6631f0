package service

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Tmpfs is the Scratch of a real node: a file system of its own per directory, so
// that its size does not depend on that of /run, and removing it frees the memory
// at once.
type Tmpfs struct{}

// Create implements Scratch.
func (Tmpfs) Create(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	// Memory is the limit, not a share of it: a checkpoint that does not fit is
	// refused before the transfer, by the free memory of the node.
	if err := unix.Mount("podmig", dir, "tmpfs", flags, "mode=0700,size=100%,nr_inodes=1m"); err != nil {
		_ = os.Remove(dir)
		return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	return nil
}

// Remove implements Scratch.
func (Tmpfs) Remove(dir string) error {
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // Not a mount point (any more).
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	return os.RemoveAll(dir)
}

// Dir is a Scratch of ordinary directories, for tests.
type Dir struct{}

// Create implements Scratch.
func (Dir) Create(dir string) error { return os.Mkdir(dir, 0o700) }

// Remove implements Scratch.
func (Dir) Remove(dir string) error { return os.RemoveAll(dir) }
