package tree

import (
	"errors"
	"fmt"
	"path"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// Receiver writes the entries of a tree below a directory. It implements
// checkpoint.PartSink. Directories that exist already are kept, because something
// may be mounted from them; other files are replaced.
type Receiver struct {
	kind checkpoint.Kind
	root int
	// cur is the regular file that data goes to, -1 between files.
	cur     int
	curPath string
	curMod  int64
}

var _ checkpoint.PartSink = (*Receiver)(nil)

// Receive opens a directory for the entries of a tree. The caller calls Close or
// Abort.
func Receive(dir string, kind checkpoint.Kind) (*Receiver, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	return &Receiver{kind: kind, root: fd, cur: -1}, nil
}

// at opens a path below the root; nothing on the way may be a link or a mount.
func (r *Receiver) at(name string, flags uint64, mode uint64) (int, error) {
	return unix.Openat2(r.root, name, &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Mode:    mode,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
}

func (r *Receiver) parent(name string) (int, string, error) {
	fd, err := r.at(path.Dir(name), unix.O_PATH|unix.O_DIRECTORY, 0)
	return fd, path.Base(name), err
}

// Entry implements checkpoint.PartSink.
func (r *Receiver) Entry(e *checkpoint.Entry) error {
	if err := r.finish(); err != nil {
		return err
	}
	if err := r.entry(e); err != nil {
		return fmt.Errorf("create %s %q: %w", e.Type, e.Path, err)
	}
	return nil
}

func (r *Receiver) entry(e *checkpoint.Entry) error {
	if e.Path == "." {
		if e.Type == checkpoint.TypeDirEnd {
			return times(r.root, "", e.ModTime)
		}
		return r.attributes(r.root, "", e)
	}
	dir, base, err := r.parent(e.Path)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	var st unix.Stat_t
	err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	exists := err == nil
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	isDir := exists && st.Mode&unix.S_IFMT == unix.S_IFDIR
	switch e.Type {
	case checkpoint.TypeDirEnd:
		if !isDir {
			return errors.New("it is no directory")
		}
		return times(dir, base, e.ModTime)
	case checkpoint.TypeDir:
		if isDir {
			break
		}
		if exists {
			return errors.New("a file of another type is in the way")
		}
		if err := unix.Mkdirat(dir, base, 0o700); err != nil {
			return err
		}
	case checkpoint.TypeHardlink:
		return r.hardlink(e, dir, base, exists)
	default:
		if isDir {
			return errors.New("a directory is in the way")
		}
		if exists {
			if err := unix.Unlinkat(dir, base, 0); err != nil {
				return err
			}
		}
		if e.Type == checkpoint.TypeFile {
			return r.create(e, dir, base)
		}
		if err := special(e, dir, base); err != nil {
			return err
		}
	}
	if e.Type == checkpoint.TypeWhiteout {
		return nil
	}
	return r.attributes(dir, base, e)
}

func special(e *checkpoint.Entry, dir int, base string) error {
	switch e.Type {
	case checkpoint.TypeSymlink:
		return unix.Symlinkat(e.Link, dir, base)
	case checkpoint.TypeFIFO:
		return unix.Mknodat(dir, base, unix.S_IFIFO|0o600, 0)
	case checkpoint.TypeSocket:
		return unix.Mknodat(dir, base, unix.S_IFSOCK|0o600, 0)
	case checkpoint.TypeWhiteout:
		return unix.Mknodat(dir, base, unix.S_IFCHR, 0)
	}
	return fmt.Errorf("type %s is unknown", e.Type)
}

func (r *Receiver) hardlink(e *checkpoint.Entry, dir int, base string, exists bool) error {
	from, name, err := r.parent(e.Link)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	if exists {
		if err := unix.Unlinkat(dir, base, 0); err != nil {
			return err
		}
	}
	return unix.Linkat(from, name, dir, base, 0)
}

func (r *Receiver) create(e *checkpoint.Entry, dir int, base string) error {
	fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	r.cur, r.curPath, r.curMod = fd, e.Path, e.ModTime
	if err := unix.Ftruncate(fd, e.Size); err != nil {
		return err
	}
	return r.attributes(dir, base, e)
}

// attributes sets owner, mode and extended attributes, in this order: a change of
// the owner clears setuid and capabilities.
func (r *Receiver) attributes(dir int, base string, e *checkpoint.Entry) error {
	flags := unix.AT_SYMLINK_NOFOLLOW
	name := fdPath(dir) + "/" + base
	if base == "" {
		flags, name = unix.AT_EMPTY_PATH, fdPath(dir)
	}
	if err := unix.Fchownat(dir, base, int(e.UID), int(e.GID), flags); err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	if e.Type == checkpoint.TypeSymlink {
		return times(dir, base, e.ModTime)
	}
	// The last element is no link: this process has created it, or it was found
	// to be a directory, and only this process writes here.
	if err := unix.Chmod(name, e.Mode); err != nil {
		return fmt.Errorf("mode: %w", err)
	}
	for k, v := range e.Xattrs {
		set := unix.Lsetxattr
		if base == "" {
			set = unix.Setxattr
		}
		if err := set(name, k, v, 0); err != nil {
			return fmt.Errorf("extended attribute %s: %w", k, err)
		}
	}
	return times(dir, base, e.ModTime)
}

func times(dir int, base string, mod int64) error {
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(mod)}
	var err error
	if base == "" {
		err = unix.UtimesNanoAt(unix.AT_FDCWD, fdPath(dir), ts, 0)
	} else {
		err = unix.UtimesNanoAt(dir, base, ts, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

// Data implements checkpoint.PartSink.
func (r *Receiver) Data(off int64, b []byte) error {
	if r.cur < 0 {
		return fmt.Errorf("%w: data outside a file", checkpoint.ErrFormat)
	}
	for len(b) > 0 {
		n, err := unix.Pwrite(r.cur, b, off)
		if err != nil {
			return fmt.Errorf("write %q: %w", r.curPath, err)
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// Pages implements checkpoint.PartSink.
func (r *Receiver) Pages(uint32, uint64, uint32, []byte) error {
	return fmt.Errorf("%w: pages in a tree", checkpoint.ErrFormat)
}

func (r *Receiver) finish() error {
	if r.cur < 0 {
		return nil
	}
	fd := r.cur
	r.cur = -1
	defer unix.Close(fd)
	return times(fd, "", r.curMod)
}

// Close implements checkpoint.PartSink.
func (r *Receiver) Close() error {
	if r.root < 0 {
		return nil
	}
	err := r.finish()
	unix.Close(r.root)
	r.root = -1
	return err
}

// Abort releases what Close would, after an error.
func (r *Receiver) Abort() { _ = r.Close() }
