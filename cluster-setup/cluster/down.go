package cluster

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"podmig.dev/podmig/cluster-setup/cgroup"
)

// destroyTimeout bounds the end of a cluster: killing is quick, letting go of a killed process's memory can take a while.
const destroyTimeout = time.Minute

// Down removes a cluster and everything it made. It needs no record of what exists, so that it also works after a crash in the
// middle of Up, and it succeeds when there is nothing.
func Down(ctx context.Context, name, dir string) error {
	if err := checkName(name); err != nil {
		return err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("find cluster: %w", err)
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, lockPath(dir))
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	return destroy(ctx, layout, name, dir)
}

func destroy(ctx context.Context, layout cgroup.Layout, name, dir string) error {
	if err := layout.Kill(ctx, cgroupOf(name, dir)); err != nil {
		return fmt.Errorf("end cluster: %w", err)
	}
	if err := layout.Remove(ctx, cgroupOf(name, dir)); err != nil {
		return fmt.Errorf("end cluster: %w", err)
	}
	if err := releaseHost(ctx, layout); err != nil {
		return err
	}
	// All mounts were made in namespaces that are gone. Should one be here after all, removing files through it would be wrong.
	if err := noMountsBelow(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove files of cluster: %w", err)
	}
	if err := os.RemoveAll(lockPath(dir)); err != nil {
		return fmt.Errorf("remove files of cluster: %w", err)
	}
	return nil
}

func noMountsBelow(dir string) error {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	defer file.Close()
	scanner := bufio.NewScanner(file)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			return fmt.Errorf("%s is a mount point that this program did not make: unmount it, then try again", fields[4])
		}
	}
	if err := scanner.Err(); err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	return nil
}
