package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// Send writes the content of a directory to a part of a stream.
func Send(ctx context.Context, dir string, kind checkpoint.Kind, out *checkpoint.PartWriter) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	s := &sender{ctx: ctx, kind: kind, out: out, links: map[inode]string{}, buf: make([]byte, checkpoint.MaxData)}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return fmt.Errorf("stat %s: %w", dir, err)
	}
	s.dev = st.Dev
	if err := s.dir(os.NewFile(uintptr(fd), dir), ".", &st); err != nil {
		return fmt.Errorf("read %s: %w", dir, err)
	}
	return nil
}

// Size returns the bytes on disk below a directory, without following links.
func Size(ctx context.Context, dir string) (uint64, error) {
	var total uint64
	var walk func(fd int, name string) error
	walk = func(at int, name string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil
		} else if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), name)
		defer f.Close()
		for {
			names, _ := f.Readdirnames(1024)
			if len(names) == 0 {
				return nil
			}
			for _, n := range names {
				var st unix.Stat_t
				if unix.Fstatat(fd, n, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
					continue
				}
				total += uint64(st.Blocks) * 512
				if st.Mode&unix.S_IFMT == unix.S_IFDIR {
					if err := walk(fd, n); err != nil {
						return err
					}
				}
			}
		}
	}
	if err := walk(unix.AT_FDCWD, dir); err != nil {
		return total, fmt.Errorf("size of %s: %w", dir, err)
	}
	return total, nil
}

type inode struct{ dev, ino uint64 }

type sender struct {
	ctx  context.Context
	kind checkpoint.Kind
	out  *checkpoint.PartWriter
	dev  uint64
	// links remembers the first name of every file with several names.
	links map[inode]string
	buf   []byte
}

func (s *sender) dir(f *os.File, name string, st *unix.Stat_t) error {
	defer f.Close()
	if err := s.ctx.Err(); err != nil {
		return err
	}
	e, err := s.entry(name, checkpoint.TypeDir, st)
	if err != nil {
		return err
	}
	if e.Xattrs, err = s.xattrs(fdPath(int(f.Fd()))); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := s.out.Entry(e); err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	sort.Strings(names)
	for _, n := range names {
		if err := s.file(int(f.Fd()), n, path.Join(name, n)); err != nil {
			return err
		}
	}
	return s.out.Entry(&checkpoint.Entry{Path: name, Type: checkpoint.TypeDirEnd, ModTime: e.ModTime})
}

func (s *sender) entry(name string, typ checkpoint.EntryType, st *unix.Stat_t) (*checkpoint.Entry, error) {
	return &checkpoint.Entry{
		Path: name, Type: typ, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, ModTime: st.Mtim.Nano(),
	}, nil
}

func (s *sender) file(at int, base, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if st.Dev != s.dev {
		return fmt.Errorf("%s is on another file system: a mount inside a volume or writable layer can not be moved", name)
	}
	format := st.Mode & unix.S_IFMT
	if format == unix.S_IFDIR {
		fd, err := unix.Openat(at, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return s.dir(os.NewFile(uintptr(fd), name), name, &st)
	}
	if st.Nlink > 1 && format != unix.S_IFCHR {
		key := inode{st.Dev, st.Ino}
		if first, ok := s.links[key]; ok {
			return s.out.Entry(&checkpoint.Entry{Path: name, Type: checkpoint.TypeHardlink, Link: first})
		}
		s.links[key] = name
	}
	switch format {
	case unix.S_IFREG:
		return s.regular(at, base, name, &st)
	case unix.S_IFLNK:
		n, err := unix.Readlinkat(at, base, s.buf)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		e, _ := s.entry(name, checkpoint.TypeSymlink, &st)
		e.Mode, e.Link = 0, string(s.buf[:n])
		return s.out.Entry(e)
	case unix.S_IFIFO, unix.S_IFSOCK:
		typ := checkpoint.TypeFIFO
		if format == unix.S_IFSOCK {
			typ = checkpoint.TypeSocket
		}
		e, _ := s.entry(name, typ, &st)
		return s.out.Entry(e)
	case unix.S_IFCHR:
		if st.Rdev == 0 && s.kind == checkpoint.KindRootfs {
			return s.out.Entry(&checkpoint.Entry{Path: name, Type: checkpoint.TypeWhiteout})
		}
	}
	return fmt.Errorf("%s is a device node: devices can not be moved, remove it", name)
}

func (s *sender) regular(at int, base, name string, st *unix.Stat_t) error {
	fd, err := unix.Openat(at, base, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer unix.Close(fd)
	e, err := s.entry(name, checkpoint.TypeFile, st)
	if err != nil {
		return err
	}
	e.Size = st.Size
	if e.Xattrs, err = s.xattrs(fdPath(fd)); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := s.out.Entry(e); err != nil {
		return err
	}
	for off := int64(0); off < st.Size; {
		start, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // The rest is a hole.
		} else if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		end = min(end, st.Size)
		for start < end {
			if err := s.ctx.Err(); err != nil {
				return err
			}
			n, err := unix.Pread(fd, s.buf[:min(int64(len(s.buf)), end-start)], start)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if n == 0 {
				return fmt.Errorf("%s became shorter while its container was frozen", name)
			}
			if err := s.out.Data(start, s.buf[:n]); err != nil {
				return err
			}
			start += int64(n)
		}
		off = end
	}
	return nil
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// unsafeOverlay are attributes with which a file of a writable layer takes content
// from elsewhere in the layers below; containerd's snapshotter does not use them.
var unsafeOverlay = []string{"trusted.overlay.redirect", "trusted.overlay.metacopy"}

func (s *sender) xattrs(file string) (map[string][]byte, error) {
	n, err := unix.Listxattr(file, nil)
	if errors.Is(err, unix.ENOTSUP) || (err == nil && n == 0) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	list := make([]byte, n+256)
	if n, err = unix.Listxattr(file, list); err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	out := map[string][]byte{}
	for _, name := range strings.Split(string(list[:n]), "\x00") {
		for _, u := range unsafeOverlay {
			if name == u && s.kind == checkpoint.KindRootfs {
				return nil, fmt.Errorf("attribute %s refers to the layers of this node: mount overlays without redirect_dir and metacopy", name)
			}
		}
		if name == "" || !checkpoint.MovableXattr(s.kind, name) {
			continue
		}
		val := make([]byte, 64<<10)
		m, err := unix.Getxattr(file, name, val)
		if errors.Is(err, unix.ENODATA) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		out[name] = val[:m:m]
	}
	return out, nil
}
