package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// stayInRoot keeps the host's files. What the host mounts later stays visible; nothing mounted here reaches the host.
func stayInRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("separate mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	return nil
}

// enterRoot builds the machine's file tree and makes it the root.
func enterRoot(spec Spec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("separate mounts: %w", err)
	}
	root := filepath.Join(spec.Dir, mergedDir)
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", spec.RootFS, filepath.Join(spec.Dir, upperDir), filepath.Join(spec.Dir, workDir))
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	steps := []func(Spec, string) error{mountKernel, mountDevices, mountDisk, mountBinds}
	for _, step := range steps {
		if err := step(spec, root); err != nil {
			return err
		}
	}
	return switchRoot(root)
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, target, err)
	}
	return nil
}

func mountKernel(spec Spec, root string) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := errors.Join(
		mount("proc", filepath.Join(root, "proc"), "proc", flags, ""),
		mount("sysfs", filepath.Join(root, "sys"), "sysfs", flags, ""),
		// CRIU keeps what it learned about the kernel below /run, but only on a tmpfs.
		mount("tmpfs", filepath.Join(root, "run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"),
		mount("tmpfs", filepath.Join(root, "tmp"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
	); err != nil {
		return err
	}
	if err := spec.Layout.Mount(filepath.Join(root, "sys/fs/cgroup")); err != nil {
		return err
	}
	return spec.Layout.Delegate(filepath.Join(root, "sys/fs/cgroup"), os.Getpid())
}

// devices of the host that a node needs: containers get the plain ones, CRIU and page tracking use userfaultfd and fuse.
var devices = []string{"null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "userfaultfd", "kvm", "net/tun", "loop-control"}

func mountDevices(_ Spec, root string) error {
	dev := filepath.Join(root, "dev")
	if err := mount("tmpfs", dev, "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return err
	}
	for _, name := range devices {
		if err := copyDevice("/dev/"+name, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	if err := errors.Join(
		mount("devpts", filepath.Join(dev, "pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"),
		mount("tmpfs", filepath.Join(dev, "shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
		mount("mqueue", filepath.Join(dev, "mqueue"), "mqueue", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
	); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return fmt.Errorf("make device link: %w", err)
		}
	}
	return nil
}

// copyDevice makes the same device node; a host without the device has nodes without it.
func copyDevice(source, target string) error {
	var stat unix.Stat_t
	err := unix.Stat(source, &stat)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at device %s: %w", source, err)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return fmt.Errorf("make device: %w", err)
	}
	if err := unix.Mknod(target, stat.Mode, int(stat.Rdev)); err != nil {
		return fmt.Errorf("make device %s: %w", target, err)
	}
	return os.Chmod(target, os.FileMode(stat.Mode&0o777))
}

// onDisk lists the folders that must not lie on the overlay: containerd stacks overlays of its own, and the pods' volumes should
// be ordinary files.
var onDisk = []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers"}

func mountDisk(spec Spec, root string) error {
	binds := []Bind{{Source: filepath.Join(spec.Dir, logDir), Target: "/var/log/podmig"}}
	for _, dir := range onDisk {
		source := spec.Handle().Disk(dir)
		if err := os.MkdirAll(source, 0o755); err != nil {
			return fmt.Errorf("make folder on disk: %w", err)
		}
		binds = append(binds, Bind{Source: source, Target: dir})
	}
	return bindAll(binds, root)
}

func mountBinds(spec Spec, root string) error { return bindAll(spec.Binds, root) }

func bindAll(binds []Bind, root string) error {
	for _, bind := range binds {
		target := filepath.Join(root, bind.Target)
		info, err := os.Stat(bind.Source)
		if err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		// A file covers a file that is there already, a folder may be new.
		if info.IsDir() {
			err = mount(bind.Source, target, "", unix.MS_BIND, "")
		} else {
			err = unix.Mount(bind.Source, target, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("bind %s: %w", bind.Source, err)
		}
		if bind.ReadOnly {
			if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				return fmt.Errorf("protect %s: %w", target, err)
			}
		}
	}
	return nil
}

// switchRoot makes root the root directory, lets go of the old one, and shares its mounts onward to containers as systemd does
// on a real host.
func switchRoot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter root file system: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	// The old root now lies on top of the new one, and the working directory is still in the old.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	return unix.Chdir("/")
}
