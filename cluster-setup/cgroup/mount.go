package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount mounts the same hierarchies below root for a node. The caller must be in the node's cgroup namespace, which makes
// the node's own folder the top of each tree.
func (l Layout) Mount(root string) error {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return fmt.Errorf("mount control groups: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if l.Mode == V2 {
		if err := unix.Mount("cgroup2", root, "cgroup2", flags, ""); err != nil {
			return fmt.Errorf("mount version 2 control groups: %w", err)
		}
		return nil
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", flags, "mode=755"); err != nil {
		return fmt.Errorf("mount control groups: %w", err)
	}
	for _, hierarchy := range l.Hierarchies {
		name, kind, options := hierarchy.mountArguments()
		target := filepath.Join(root, name)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return fmt.Errorf("mount control groups: %w", err)
		}
		if err := unix.Mount("cgroup", target, kind, flags, options); err != nil {
			return fmt.Errorf("mount control groups %s: %w", name, err)
		}
		// Programs look controllers up by their single names.
		if len(hierarchy.Controllers) > 1 {
			for _, controller := range hierarchy.Controllers {
				if err := os.Symlink(name, filepath.Join(root, controller)); err != nil {
					return fmt.Errorf("mount control groups: %w", err)
				}
			}
		}
	}
	return nil
}

// mountArguments returns the folder name, file system type and options of one tree in a node.
func (h Hierarchy) mountArguments() (name, kind, options string) {
	switch {
	case h.V2:
		return "unified", "cgroup2", ""
	case h.Name != "" && len(h.Controllers) == 0:
		return h.Name, "cgroup", "none,name=" + h.Name
	default:
		joined := strings.Join(h.Controllers, ",")
		return joined, "cgroup", joined
	}
}

// Delegate prepares the top of a version 2 node: the processes of the node's init move one folder down, because only a folder
// without processes may hand controllers on to the kubelet's children. It does nothing on other hosts.
func (l Layout) Delegate(root string, pid int) error {
	if l.Mode != V2 {
		return nil
	}
	init := filepath.Join(root, "init")
	if err := os.MkdirAll(init, 0o755); err != nil {
		return fmt.Errorf("delegate control groups: %w", err)
	}
	if err := os.WriteFile(filepath.Join(init, "cgroup.procs"), fmt.Append(nil, pid), 0o644); err != nil {
		return fmt.Errorf("delegate control groups: %w", err)
	}
	return enableControllers(root)
}
