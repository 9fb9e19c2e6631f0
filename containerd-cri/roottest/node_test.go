//go:build root

package roottest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const stageEnv = "PODMIG_ROOTTEST_STAGE"

// TestMain runs three times in a row: outside, where it prepares a directory and a
// control group; in new namespaces as process 1, where it mounts the node; and, after
// an exec that gives every thread the new namespaces, inside the node, where the
// tests run.
func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(stageEnv) {
	case "":
		err = outside()
	case "mount":
		err = enterNode()
	case "inside":
		os.Exit(m.Run())
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "roottest:", err)
		os.Exit(1)
	}
}

func env(name, def string) (string, error) {
	v := os.Getenv(name)
	if v == "" {
		v = def
	}
	abs, err := filepath.Abs(v)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(abs); err != nil {
		return "", fmt.Errorf("%s: %w (make image builds it)", name, err)
	}
	return abs, nil
}

func outside() (err error) {
	rootfs, err := env("PODMIG_ROOTFS", "../../.build/image/rootfs")
	if err != nil {
		return err
	}
	bin, err := env("PODMIG_BIN", "../../.build/bin")
	if err != nil {
		return err
	}
	images, err := env("PODMIG_IMAGES", "../../.build/images")
	if err != nil {
		return err
	}
	base, err := os.MkdirTemp("/var/tmp", "podmig-roottest-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(base)
	build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(base, "workload"), "./workload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the workload: %w: %s", err, out)
	}
	groups, err := makeCgroups("podmig-roottest-" + strconv.Itoa(os.Getpid()))
	defer func() {
		for _, g := range groups {
			removeCgroup(g)
		}
	}()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ready, start, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), stageEnv+"=mount", "ROOTTEST_BASE="+base, "ROOTTEST_ROOTFS="+rootfs, "ROOTTEST_BIN="+bin, "ROOTTEST_IMAGES="+images)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{ready}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	// The death signal is tied to the thread that starts the child.
	runtime.LockOSThread()
	if err := cmd.Start(); err != nil {
		return err
	}
	ready.Close()
	for _, g := range groups {
		if err := os.WriteFile(filepath.Join(g, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			return err
		}
	}
	start.Close()
	return cmd.Wait()
}

// makeCgroups makes a control group of the name in every hierarchy, below the group
// of this process.
func makeCgroups(name string) ([]string, error) {
	var made []string
	f, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		p := strings.SplitN(s.Text(), ":", 3)
		root, err := cgroupMount(p[1])
		if err != nil {
			return made, err
		}
		dir := filepath.Join(root, p[2], name)
		if p[1] == "cpuset" {
			if err := os.WriteFile(filepath.Join(root, p[2], "cgroup.clone_children"), []byte("1"), 0); err != nil {
				return made, err
			}
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return made, err
		}
		made = append(made, dir)
	}
	return made, nil
}

// cgroupMount returns where a hierarchy is mounted; the name is as in
// /proc/PID/cgroup.
func cgroupMount(controllers string) (string, error) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		if controllers == "" && f[2] == "cgroup2" {
			return f[1], nil
		}
		if controllers == "" || f[2] != "cgroup" {
			continue
		}
		for o := range strings.SplitSeq(f[3], ",") {
			if o == strings.Split(controllers, ",")[0] {
				return f[1], nil
			}
		}
	}
	return "", fmt.Errorf("cgroup hierarchy %q is not mounted", controllers)
}

func removeCgroup(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}

// enterNode is process 1 of the node before the exec.
func enterNode() error {
	runtime.LockOSThread()
	// The end of the pipe says that the control groups are set.
	pipe := os.NewFile(3, "ready")
	_, _ = io.Copy(io.Discard, pipe)
	pipe.Close()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("cgroup namespace: %w", err)
	}
	base, rootfs, bin := os.Getenv("ROOTTEST_BASE"), os.Getenv("ROOTTEST_ROOTFS"), os.Getenv("ROOTTEST_BIN")
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	merged := filepath.Join(base, "merged")
	for _, d := range []string{"upper", "work", "merged", "containerd"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			return err
		}
	}
	type mnt struct {
		src, dst, typ string
		flags         uintptr
		data          string
	}
	mounts := []mnt{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", rootfs, base, base)},
		{"proc", merged + "/proc", "proc", 0, ""},
		{"sysfs", merged + "/sys", "sysfs", 0, ""},
		{"dev", merged + "/dev", "tmpfs", 0, "mode=755"},
		{"devpts", merged + "/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,gid=5"},
		{"shm", merged + "/dev/shm", "tmpfs", 0, ""},
		{"run", merged + "/run", "tmpfs", 0, "mode=755"},
		{"tmp", merged + "/tmp", "tmpfs", 0, ""},
		{base + "/containerd", merged + "/var/lib/containerd", "", unix.MS_BIND, ""},
		{bin, merged + "/opt/bin", "", unix.MS_BIND, ""},
		{os.Getenv("ROOTTEST_IMAGES"), merged + "/opt/images", "", unix.MS_BIND, ""},
		{self, merged + "/roottest", "", unix.MS_BIND, ""},
		{base + "/workload", merged + "/workload", "", unix.MS_BIND, ""},
		{"cgroup", merged + "/sys/fs/cgroup", "tmpfs", 0, "mode=755"},
	}
	lines := strings.Split(strings.TrimSpace(string(cgroups)), "\n")
	for _, line := range lines {
		p := strings.SplitN(line, ":", 3)
		switch {
		case p[1] == "" && len(lines) == 1:
			mounts[len(mounts)-1] = mnt{"cgroup2", merged + "/sys/fs/cgroup", "cgroup2", 0, ""}
		case p[1] == "":
			mounts = append(mounts, mnt{"cgroup2", merged + "/sys/fs/cgroup/unified", "cgroup2", 0, ""})
		default:
			name := strings.TrimPrefix(p[1], "name=")
			data := p[1]
			if name != p[1] {
				data = "none," + data
			}
			mounts = append(mounts, mnt{"cgroup", merged + "/sys/fs/cgroup/" + name, "cgroup", 0, data})
		}
	}
	for _, m := range mounts {
		if m.flags&unix.MS_BIND != 0 {
			if st, err := os.Stat(m.src); err == nil && !st.IsDir() {
				if err := os.WriteFile(m.dst, nil, 0o755); err != nil {
					return err
				}
			}
		}
		if err := os.MkdirAll(m.dst, 0o755); err != nil && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
		if err := unix.Mount(m.src, m.dst, m.typ, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.src, m.dst, err)
		}
	}
	for name, dev := range map[string]uint64{"null": unix.Mkdev(1, 3), "zero": unix.Mkdev(1, 5), "full": unix.Mkdev(1, 7),
		"random": unix.Mkdev(1, 8), "urandom": unix.Mkdev(1, 9), "tty": unix.Mkdev(5, 0), "kmsg": unix.Mkdev(1, 11)} {
		if err := unix.Mknod(merged+"/dev/"+name, unix.S_IFCHR|0o666, int(dev)); err != nil {
			return err
		}
		if err := os.Chmod(merged+"/dev/"+name, 0o666); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, merged+"/dev/"+name); err != nil {
			return err
		}
	}
	if err := unix.Chdir(merged); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("roottest")); err != nil {
		return err
	}
	// CRIU's page server moves memory through pipes of this size.
	if err := os.WriteFile("/proc/sys/fs/pipe-max-size", []byte("67108864"), 0); err != nil {
		return err
	}
	environ := []string{stageEnv + "=inside", "PATH=/opt/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TMPDIR=/tmp"}
	return unix.Exec("/roottest", append([]string{"/roottest"}, os.Args[1:]...), environ)
}
