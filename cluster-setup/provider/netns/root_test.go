//go:build root

package netns

// These tests make machines as root, on the host's control groups as they are mounted and on its version 2 tree alone. They need the
// node image, and show what a component sees of its machine; whether a kubelet is content with it is for package cluster's tests.

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"podmig.dev/podmig/cluster-setup/cgroup"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

func TestMain(m *testing.M) {
	if machine, err := Main(os.Args); machine {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func newMachine(t *testing.T, layout cgroup.Layout) Machine {
	t.Helper()
	rootfs, err := filepath.EvalSymlinks("../../../.build/image/rootfs")
	if err != nil {
		t.Fatalf("build the node image first: %v", err)
	}
	if rootfs, err = filepath.Abs(rootfs); err != nil {
		t.Fatal(err)
	}
	spec := Spec{
		Name: "testnode", Dir: t.TempDir(), Cgroup: fmt.Sprintf("/podmig-test-%d/machine", os.Getpid()), Layout: layout, RootFS: rootfs,
		Supervision: []supervisor.Component{{Name: "sleeper", Args: []string{"sleep", "1000"}, Log: "/var/log/podmig/sleeper.log"}},
	}
	destroy := func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := spec.Handle().Destroy(ctx); err != nil {
			t.Error(err)
		}
		if err := layout.Remove(ctx, filepath.Dir(spec.Cgroup)); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(destroy)
	machine, err := Start(t.Context(), spec, func(int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return machine
}

func run(t *testing.T, m Machine, script string) string {
	t.Helper()
	var out strings.Builder
	err := m.Supervisor().Run(t.Context(), supervisor.Command{Args: []string{"sh", "-c", script}, Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, &out)
	}
	return strings.TrimSpace(out.String())
}

func TestMachine(t *testing.T) {
	whole, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	machine := newMachine(t, whole)
	for _, test := range []struct{ name, script, want string }{
		{"host name", "hostname", "testnode"},
		{"first process", "cat /proc/1/comm", "exe"},
		{"run is a tmpfs", "stat -f -c %T /run", "tmpfs"},
		{"containerd is not on the overlay", "stat -f -c %T /var/lib/containerd | grep -c overlay", "0"},
		{"nothing of the host is mounted", "grep -c ' /proc/sys/fs/binfmt_misc \\| /boot ' /proc/self/mountinfo", "0"},
		{"own control groups only", "cut -d: -f3 /proc/self/cgroup | sort -u", "/"},
		{"routes packets", "cat /proc/sys/net/ipv4/ip_forward", "1"},
		{"no address but its own", "ip -o addr show scope global | wc -l", "0"},
		{"devices", "test -c /dev/null && test -c /dev/ptmx && echo yes", "yes"},
		{"mounts reach containers", "findmnt --noheadings --output PROPAGATION /", "shared"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := run(t, machine, test.script+" || true"); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	t.Run("components inherit three files", func(t *testing.T) {
		status, err := machine.Supervisor().Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := run(t, machine, fmt.Sprintf("ls /proc/%d/fd | tr '\\n' ' '", status[0].PID)); got != "0 1 2" {
			t.Errorf("got %q", got)
		}
		pid, err := machine.HostPID(status[0].PID)
		if err != nil {
			t.Fatal(err)
		}
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || strings.TrimSpace(string(name)) != "sleep" {
			t.Errorf("process %d is %q, %v", pid, name, err)
		}
	})
}

func TestMachineOnVersion2(t *testing.T) {
	whole, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(whole.Hierarchies, func(h cgroup.Hierarchy) bool { return h.V2 })
	if i < 0 {
		t.Fatal("this host has no version 2 tree to try this on: mount one on /sys/fs/cgroup/unified")
	}
	tree := whole.Hierarchies[i : i+1]
	machine := newMachine(t, cgroup.Layout{Mode: cgroup.V2, Root: tree[0].MountPoint, Hierarchies: tree})
	if got := run(t, machine, "stat -f -c %T /sys/fs/cgroup"); got != "cgroup2fs" {
		t.Errorf("control groups are a %s", got)
	}
	// The kubelet hands controllers on from the top, which must hold no process.
	if got := run(t, machine, "cat /sys/fs/cgroup/cgroup.procs"); got != "" {
		t.Errorf("processes %q are at the top", got)
	}
	if got := run(t, machine, "cat /sys/fs/cgroup/init/cgroup.procs | wc -l"); got < "3" {
		t.Errorf("only %s processes are in the folder below", got)
	}
}

func TestStartReportsWhatFailed(t *testing.T) {
	layout, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	spec := Spec{Name: "broken", Dir: t.TempDir(), Cgroup: fmt.Sprintf("/podmig-test-%d/broken", os.Getpid()), Layout: layout, RootFS: "/nonexistent"}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := spec.Handle().Destroy(ctx); err != nil {
			t.Error(err)
		}
		if err := layout.Remove(ctx, filepath.Dir(spec.Cgroup)); err != nil {
			t.Error(err)
		}
	})
	if _, err := Start(t.Context(), spec, func(int) error { return nil }); err == nil || !strings.Contains(err.Error(), "mount root file system") {
		t.Errorf("got %v", err)
	}
}
