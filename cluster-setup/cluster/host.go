package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cgroup"
)

// Some kernel settings belong to the whole machine. A kubelet writes its own values into a few of them, and two must be raised for
// CRIU and for many nodes on one machine. The first cluster notes what it found, the last one to go puts it back.

// hostDir lies on a tmpfs: after a reboot there is nothing to put back.
const hostDir = "/run/podmig"

// raised settings get at least this value.
var raised = map[string]int64{
	// CRIU's page server uses large pipes and breaks silently when it may not.
	"fs/pipe-max-size":              16 << 20,
	"fs/inotify/max_user_instances": 8192,
}

// touched settings are changed by every kubelet that starts.
var touched = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// prepareHost notes and raises settings and makes the cluster's control group, which tells others that the settings are in use.
func prepareHost(layout cgroup.Layout, name, dir string) error {
	unlock, err := lockHost()
	if err != nil {
		return err
	}
	defer unlock()
	if err := layout.Create(cgroupOf(name, dir)); err != nil {
		return err
	}
	if err := noteSettings(); err != nil {
		return err
	}
	for name, value := range raised {
		have, err := readSetting(name)
		if err != nil {
			return err
		}
		if have >= value {
			continue
		}
		if err := writeSetting(name, value); err != nil {
			return err
		}
	}
	return nil
}

func noteSettings() error {
	path := filepath.Join(hostDir, "settings.json")
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	found := map[string]int64{}
	names := touched
	for name := range raised {
		names = append(names[:len(names):len(names)], name)
	}
	for _, name := range names {
		value, err := readSetting(name)
		if err != nil {
			return err
		}
		found[name] = value
	}
	data, err := json.Marshal(found)
	if err != nil {
		return fmt.Errorf("note kernel settings: %w", err)
	}
	return writeFile(path, data, 0o600)
}

// releaseHost puts the settings back when no cluster is left.
func releaseHost(ctx context.Context, layout cgroup.Layout) error {
	unlock, err := lockHost()
	if err != nil {
		return err
	}
	defer unlock()
	empty, err := layout.Empty(cgroupParent)
	if err != nil {
		return err
	}
	if !empty {
		return nil
	}
	if err := layout.Remove(ctx, cgroupParent); err != nil {
		return err
	}
	path := filepath.Join(hostDir, "settings.json")
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return os.RemoveAll(hostDir)
	}
	if err != nil {
		return fmt.Errorf("put kernel settings back: %w", err)
	}
	var found map[string]int64
	if err := json.Unmarshal(data, &found); err != nil {
		return fmt.Errorf("put kernel settings back: %w", err)
	}
	for name, value := range found {
		if err := writeSetting(name, value); err != nil {
			return err
		}
	}
	return os.RemoveAll(hostDir)
}

// lockHost waits: other clusters hold it only for a moment. It locks a folder that is always there, so nothing remains.
func lockHost() (func(), error) {
	dir, err := os.Open(filepath.Dir(hostDir))
	if err != nil {
		return nil, fmt.Errorf("lock host settings: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock host settings: %w", err)
	}
	return func() { dir.Close() }, nil
}

func readSetting(name string) (int64, error) {
	content, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return 0, fmt.Errorf("read kernel setting: %w", err)
	}
	value, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read kernel setting %s: %w", name, err)
	}
	return value, nil
}

func writeSetting(name string, value int64) error {
	have, err := readSetting(name)
	if err != nil || have == value {
		return err
	}
	if err := os.WriteFile("/proc/sys/"+name, strconv.AppendInt(nil, value, 10), 0o644); err != nil {
		return fmt.Errorf("write kernel setting: %w", err)
	}
	return nil
}
