// Package netns makes machines out of Linux namespaces: each has its own network, mounts, processes, host name, IPC and control
// groups, and looks like a small host from inside.
//
// A machine is held by nothing but its first process and its control groups. It appears in no table of the host: mounts are made
// in its own mount namespace, and its network interfaces are born in its own network namespace, so killing the first process
// removes all of them at once. That makes clean-up after a crash as simple as after a proper end. What it does not do: limit
// resources, isolate hostile programs from the host, or survive a reboot.
package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"podmig.dev/podmig/cluster-setup/cgroup"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// Spec is everything that the first process of a machine needs to know.
type Spec struct {
	Name   string        `json:"name"`
	Dir    string        `json:"dir"`    // On the host; holds all files of the machine.
	Cgroup string        `json:"cgroup"` // Path in every hierarchy.
	Layout cgroup.Layout `json:"layout"`
	// RootFS is the read-only image below the machine's own files. Empty: the machine sees the host's files.
	RootFS      string                 `json:"rootfs,omitempty"`
	Binds       []Bind                 `json:"binds,omitempty"`
	Supervision []supervisor.Component `json:"supervision"`
}

// Bind shows a folder of the host in the machine.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Machine is a handle on a machine that may or may not run.
type Machine struct {
	Name   string
	Dir    string
	Cgroup string
	Layout cgroup.Layout
}

// ErrNotRunning says that the machine's first process is gone.
var ErrNotRunning = errors.New("machine does not run")

// Names of the files in a machine's folder.
const (
	specFile   = "spec.json"
	pidFile    = "init.pid"
	socketFile = "control.sock"
	logDir     = "logs"
	upperDir   = "upper"
	workDir    = "work"
	mergedDir  = "root"
	diskDir    = "disk"
)

// Handle returns the machine that Start would make of the spec.
func (s Spec) Handle() Machine {
	return Machine{Name: s.Name, Dir: s.Dir, Cgroup: s.Cgroup, Layout: s.Layout}
}

// Upper is the folder whose content covers the image's: files put there before the start are in the machine.
func (m Machine) Upper() string { return filepath.Join(m.Dir, upperDir) }

// Disk is the host's folder of one of the machine's folders that do not lie on its overlay, such as /var/lib/containerd.
func (m Machine) Disk(dir string) string {
	return filepath.Join(m.Dir, diskDir, strings.ReplaceAll(strings.TrimPrefix(dir, "/var/"), "/", "-"))
}

// Logs is the folder of the components' logs.
func (m Machine) Logs() string { return filepath.Join(m.Dir, logDir) }

// Supervisor gives orders to the machine's first process.
func (m Machine) Supervisor() supervisor.Client {
	return supervisor.Client{Socket: filepath.Join(m.Dir, socketFile)}
}

// InitPID is the host's number of the machine's first process.
func (m Machine) InitPID() (int, error) {
	content, err := os.ReadFile(filepath.Join(m.Dir, pidFile))
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("%s: %w", m.Name, ErrNotRunning)
	}
	if err != nil {
		return 0, fmt.Errorf("read process number of %s: %w", m.Name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return 0, fmt.Errorf("read process number of %s: %w", m.Name, err)
	}
	// The number may belong to somebody else by now; the control group does not lie.
	inside, err := procCgroupContains(pid, m.Cgroup)
	if err != nil || !inside {
		return 0, fmt.Errorf("%s: %w", m.Name, ErrNotRunning)
	}
	return pid, nil
}

func procCgroupContains(pid int, path string) (bool, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(content)) {
		_, location, _ := strings.Cut(strings.TrimSpace(line), ":")
		_, location, _ = strings.Cut(location, ":")
		if location == path || strings.HasPrefix(location, path+"/") {
			return true, nil
		}
	}
	return false, nil
}

// HostPID translates a process number of the machine into the host's.
func (m Machine) HostPID(inner int) (int, error) {
	pids, err := m.Layout.PIDs(m.Cgroup)
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // Ended meanwhile.
		}
		for line := range strings.Lines(string(status)) {
			if numbers, ok := strings.CutPrefix(line, "NSpid:"); ok {
				fields := strings.Fields(numbers)
				// The host's number and the machine's: containers inside have a third.
				if len(fields) == 2 && fields[1] == strconv.Itoa(inner) {
					return pid, nil
				}
			}
		}
	}
	return 0, fmt.Errorf("%s has no process %d", m.Name, inner)
}

// Destroy ends all processes of the machine and removes its control groups. It succeeds when there is nothing left to do. Files
// in the machine's folder stay.
func (m Machine) Destroy(ctx context.Context) error {
	if err := m.Layout.Kill(ctx, m.Cgroup); err != nil {
		return fmt.Errorf("end %s: %w", m.Name, err)
	}
	if err := m.Layout.Remove(ctx, m.Cgroup); err != nil {
		return fmt.Errorf("end %s: %w", m.Name, err)
	}
	if err := os.Remove(filepath.Join(m.Dir, pidFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("end %s: %w", m.Name, err)
	}
	return nil
}

func (s Spec) write() (string, error) {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return "", fmt.Errorf("encode machine: %w", err)
	}
	path := filepath.Join(s.Dir, specFile)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return "", fmt.Errorf("write machine: %w", err)
	}
	return path, nil
}

func readSpec(path string) (Spec, error) {
	var spec Spec
	data, err := os.ReadFile(path)
	if err != nil {
		return spec, fmt.Errorf("read machine: %w", err)
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		return spec, fmt.Errorf("decode machine: %w", err)
	}
	return spec, nil
}
