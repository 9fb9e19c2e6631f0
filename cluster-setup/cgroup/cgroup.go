// Package cgroup gives every node of a local cluster control groups of its own, on hosts with version 1, version 2 or both.
//
// It finds out what the host mounts, makes and removes one folder per hierarchy, moves processes into it, ends everything
// inside, and mounts the hierarchies again for a node that has its own cgroup namespace. It sets no limits.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Mode says which versions the host mounts.
type Mode string

// The three kinds of hosts.
const (
	V1     Mode = "v1"
	Hybrid Mode = "hybrid" // Version 1 controllers with an additional, controller-less version 2 hierarchy.
	V2     Mode = "v2"
)

// Hierarchy is one mounted control group tree.
type Hierarchy struct {
	MountPoint  string
	V2          bool
	Controllers []string // Version 1 only; several when they are mounted together.
	Name        string   // Version 1 only; a tree without controllers has a name instead.
}

// Layout is all that a host mounts.
type Layout struct {
	Mode        Mode
	Root        string // Where the trees are mounted, normally /sys/fs/cgroup.
	Hierarchies []Hierarchy
}

// ErrNone is returned when the host mounts no control groups.
var ErrNone = errors.New("no control groups are mounted: mount them below /sys/fs/cgroup")

// Controllers of version 1, to tell them from the other mount options.
var controllers = []string{"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "net_cls", "net_prio", "perf_event", "hugetlb", "rdma", "misc"}

// Detect reads the layout of the running host.
func Detect() (Layout, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Layout{}, fmt.Errorf("read mounts: %w", err)
	}
	defer file.Close()
	return parse(file)
}

func parse(mountinfo io.Reader) (Layout, error) {
	var layout Layout
	scanner := bufio.NewScanner(mountinfo)
	for scanner.Scan() {
		before, after, found := strings.Cut(scanner.Text(), " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if !found || len(fields) < 6 || len(tail) < 3 {
			continue
		}
		point := fields[4]
		if !strings.HasPrefix(point, "/sys/fs/cgroup") {
			continue // Copies elsewhere, as containers have them, are not the host's own.
		}
		switch tail[0] {
		case "cgroup2":
			layout.Hierarchies = append(layout.Hierarchies, Hierarchy{MountPoint: point, V2: true})
		case "cgroup":
			hierarchy := Hierarchy{MountPoint: point}
			for _, option := range strings.Split(tail[2], ",") {
				if name, ok := strings.CutPrefix(option, "name="); ok {
					hierarchy.Name = name
				} else if slices.Contains(controllers, option) {
					hierarchy.Controllers = append(hierarchy.Controllers, option)
				}
			}
			layout.Hierarchies = append(layout.Hierarchies, hierarchy)
		}
	}
	if err := scanner.Err(); err != nil {
		return Layout{}, fmt.Errorf("read mounts: %w", err)
	}
	if len(layout.Hierarchies) == 0 {
		return Layout{}, ErrNone
	}
	v1 := slices.ContainsFunc(layout.Hierarchies, func(h Hierarchy) bool { return !h.V2 })
	v2 := slices.ContainsFunc(layout.Hierarchies, func(h Hierarchy) bool { return h.V2 })
	layout.Root = "/sys/fs/cgroup"
	switch {
	case v1 && v2:
		layout.Mode = Hybrid
	case v1:
		layout.Mode = V1
	default:
		layout.Mode = V2
	}
	return layout, nil
}

// Create makes the folder path in every hierarchy, parents included, ready for processes.
func (l Layout) Create(path string) error {
	for _, hierarchy := range l.Hierarchies {
		if err := hierarchy.create(path); err != nil {
			return fmt.Errorf("create control group %s: %w", path, err)
		}
	}
	return nil
}

func (h Hierarchy) create(path string) error {
	parent := h.MountPoint
	for _, part := range strings.Split(strings.Trim(path, "/"), "/") {
		if h.V2 {
			if err := enableControllers(parent); err != nil {
				return err
			}
		}
		dir := filepath.Join(parent, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		// A new cpuset is empty and refuses every process until it has processors and memory nodes.
		if slices.Contains(h.Controllers, "cpuset") {
			for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(parent, dir, name); err != nil {
					return err
				}
			}
		}
		parent = dir
	}
	return nil
}

func inherit(parent, dir, name string) error {
	have, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(have)) != "" {
		return nil
	}
	value, err := os.ReadFile(filepath.Join(parent, name))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), value, 0o644)
}

// enableControllers hands all controllers of a version 2 folder on to its children.
func enableControllers(dir string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(available)) {
		// One by one: a single controller that cannot be delegated must not take the others with it, and the kubelet
		// names any that it misses.
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644)
	}
	return nil
}

// Join moves a process into path in every hierarchy.
func (l Layout) Join(path string, pid int) error {
	for _, hierarchy := range l.Hierarchies {
		procs := filepath.Join(hierarchy.MountPoint, path, "cgroup.procs")
		if err := os.WriteFile(procs, fmt.Append(nil, pid), 0o644); err != nil {
			return fmt.Errorf("join control group: %w", err)
		}
	}
	return nil
}

// Exists tells whether any hierarchy still has path.
func (l Layout) Exists(path string) bool {
	return slices.ContainsFunc(l.Hierarchies, func(h Hierarchy) bool {
		_, err := os.Stat(filepath.Join(h.MountPoint, path))
		return err == nil
	})
}

// Empty tells whether path has no groups below it, in any hierarchy.
func (l Layout) Empty(path string) (bool, error) {
	for _, hierarchy := range l.Hierarchies {
		folders, err := hierarchy.folders(path)
		if err != nil {
			return false, fmt.Errorf("list control groups: %w", err)
		}
		if len(folders) > 1 {
			return false, nil
		}
	}
	return true, nil
}

// folders lists path and everything below it, deepest first.
func (h Hierarchy) folders(path string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(filepath.Join(h.MountPoint, path), func(name string, entry os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // Vanished while walking, or never there.
		}
		if err == nil && entry.IsDir() {
			found = append(found, name)
		}
		return err
	})
	slices.Reverse(found)
	return found, err
}
