package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Importing images costs seconds per node and cluster. The first node that has imported a set leaves a copy of containerd's folder
// beside the node image, and later nodes begin with it. The copy is made of hard links: containerd never writes into a blob or
// into the files of a finished snapshot, it only makes and removes them. What it does write into, its databases, is copied.

// stores that are kept; each is as large as its images unless a cluster still shares its files.
const storesKept = 3

const storePrefix = "store-"

// storePath names the store of this cluster's images. Another version of containerd may lay its folder out differently; another
// build of the same version does not.
func (c *Cluster) storePath(ctx context.Context) (string, error) {
	version, err := exec.CommandContext(ctx, filepath.Join(c.state.Bin, Containerd), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask containerd for its version: %w", err)
	}
	upstream, _, _ := strings.Cut(string(version), "+podmig")
	hash := sha256.New()
	fmt.Fprintln(hash, upstream)
	for _, file := range slices.Sorted(slices.Values(c.state.Images)) {
		info, err := os.Stat(file)
		if err != nil {
			return "", fmt.Errorf("find image: %w", err)
		}
		fmt.Fprintln(hash, filepath.Base(file), info.Size(), info.ModTime().UnixNano())
	}
	return filepath.Join(filepath.Dir(c.state.RootFS), storePrefix+hex.EncodeToString(hash.Sum(nil)[:8])), nil
}

func (c *Cluster) containerdDir(node string) string {
	return c.machine(node).Disk("/var/lib/containerd")
}

// seed gives nodes that have not started yet the stored images. It returns false when there is no store.
func (c *Cluster) seed(ctx context.Context, nodes []string) (bool, error) {
	store, err := c.storePath(ctx)
	if err != nil {
		return false, err
	}
	if _, err := os.Stat(store); err != nil {
		return false, nil
	}
	var group errgroup.Group
	for _, node := range nodes {
		group.Go(func() error { return linkTree(store, c.containerdDir(node)) })
	}
	err = group.Wait()
	if errors.Is(err, unix.EXDEV) || errors.Is(err, os.ErrNotExist) {
		// Another disk, or removed meanwhile by another command: importing always works.
		for _, node := range nodes {
			if err := os.RemoveAll(c.containerdDir(node)); err != nil {
				return false, fmt.Errorf("remove stored images: %w", err)
			}
		}
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("take stored images: %w", err)
	}
	return true, nil
}

// keep stores the images of a node that runs nothing yet. Its containerd stands still meanwhile, so that the databases are whole.
func (c *Cluster) keep(ctx context.Context, node string) error {
	store, err := c.storePath(ctx)
	if err != nil {
		return err
	}
	client := c.machine(node).Supervisor()
	if err := client.Stop(ctx, Containerd); err != nil {
		return fmt.Errorf("store images: %w", err)
	}
	stored := c.storeStopped(node, store)
	if err := client.Start(ctx, Containerd); err != nil {
		return errors.Join(stored, fmt.Errorf("store images: %w", err))
	}
	if stored != nil {
		return stored
	}
	return waitSocket(ctx, c.machine(node), containerdSocket)
}

func (c *Cluster) storeStopped(node, store string) error {
	partial, err := os.MkdirTemp(filepath.Dir(store), ".store-*")
	if err != nil {
		return fmt.Errorf("store images: %w", err)
	}
	defer os.RemoveAll(partial)
	err = linkTree(c.containerdDir(node), partial)
	if errors.Is(err, unix.EXDEV) {
		return nil // The cluster is on another disk than the node image; it goes without.
	}
	if err != nil {
		return fmt.Errorf("store images: %w", err)
	}
	if err := os.Rename(partial, store); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("store images: %w", err)
	}
	return removeOldStores(filepath.Dir(store))
}

func removeOldStores(dir string) error {
	stores, err := filepath.Glob(filepath.Join(dir, storePrefix+"*"))
	if err != nil {
		return fmt.Errorf("list stored images: %w", err)
	}
	age := map[string]int64{}
	for _, store := range stores {
		if info, err := os.Stat(store); err == nil {
			age[store] = info.ModTime().UnixNano()
		}
	}
	slices.SortFunc(stores, func(a, b string) int { return int(min(max(age[b]-age[a], -1), 1)) })
	for _, store := range stores[min(storesKept, len(stores)):] {
		if err := os.RemoveAll(store); err != nil {
			return fmt.Errorf("remove old images: %w", err)
		}
	}
	return nil
}

// linkTree copies a tree by linking its files. Folders keep owner, mode, attributes and time.
func linkTree(source, target string) error {
	type made struct {
		path string
		stat unix.Stat_t
	}
	var folders []made
	err := filepath.WalkDir(source, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative := strings.TrimPrefix(path, source)
		copied := target + relative
		switch {
		case strings.HasPrefix(relative, "/io.containerd.grpc.v1.introspection"):
			return nil // Every containerd has a name of its own.
		case entry.IsDir():
			var stat unix.Stat_t
			if err := unix.Lstat(path, &stat); err != nil {
				return &os.PathError{Op: "lstat", Path: path, Err: err}
			}
			folders = append(folders, made{copied, stat})
			if err := os.MkdirAll(copied, 0o700); err != nil {
				return err
			}
			return copyAttributes(path, copied)
		case strings.HasSuffix(path, ".db"):
			return copyFile(path, copied)
		case entry.Type()&fs.ModeSocket != 0:
			return nil
		default:
			return os.Link(path, copied)
		}
	})
	// From the leaves upwards: filling a folder changes its time.
	for _, folder := range slices.Backward(folders) {
		times := []unix.Timespec{folder.stat.Atim, folder.stat.Mtim}
		err = errors.Join(err,
			os.Lchown(folder.path, int(folder.stat.Uid), int(folder.stat.Gid)),
			unix.Chmod(folder.path, folder.stat.Mode&0o7777),
			unix.UtimesNanoAt(unix.AT_FDCWD, folder.path, times, unix.AT_SYMLINK_NOFOLLOW),
		)
	}
	return err
}

// copyAttributes copies extended attributes of a folder: overlays keep what they know about it there.
func copyAttributes(source, target string) error {
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(source, names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: source, Err: err}
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 4096)
		size, err := unix.Lgetxattr(source, name, value)
		if err != nil {
			return &os.PathError{Op: "getxattr", Path: source, Err: err}
		}
		if err := unix.Lsetxattr(target, name, value[:size], 0); err != nil {
			return &os.PathError{Op: "setxattr", Path: target, Err: err}
		}
	}
	return nil
}

func copyFile(source, target string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
