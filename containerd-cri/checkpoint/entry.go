package checkpoint

import (
	"fmt"
	"path"
	"strings"
)

// EntryType is the type of a file in a tree.
type EntryType string

const (
	TypeDir      EntryType = "dir"
	TypeFile     EntryType = "file"
	TypeSymlink  EntryType = "symlink"
	TypeHardlink EntryType = "hardlink"
	TypeFIFO     EntryType = "fifo"
	TypeSocket   EntryType = "socket"
	// TypeWhiteout hides a file of the layers below, in a writable layer only.
	TypeWhiteout EntryType = "whiteout"
	// TypeDirEnd closes a directory: its times are set after its content was
	// written. Nothing about open directories has to be remembered.
	TypeDirEnd EntryType = "dirend"
)

// Entry is one file of a tree. Data frames after it are its content; parts of the
// file that no frame covers are holes.
type Entry struct {
	// Path is relative to the root of the tree; the root itself is ".".
	Path string    `json:"path"`
	Type EntryType `json:"type"`
	// Mode holds the permission bits, setuid, setgid and sticky.
	Mode uint32 `json:"mode,omitempty"`
	UID  uint32 `json:"uid,omitempty"`
	GID  uint32 `json:"gid,omitempty"`
	// ModTime is nanoseconds since 1970.
	ModTime int64 `json:"mtime,omitempty"`
	Size    int64 `json:"size,omitempty"`
	// Link is the target of a symbolic link, or the path of the first name of a
	// hard link.
	Link   string            `json:"link,omitempty"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// check refuses entries that could reach outside the tree or make what a
// checkpoint must not make.
func (e *Entry) check(kind Kind) error {
	if err := checkPath(e.Path); err != nil {
		return err
	}
	if e.Mode&^uint32(0o7777) != 0 {
		return fmt.Errorf("%w: mode %o of %q has bits that are no permissions", ErrFormat, e.Mode, e.Path)
	}
	if e.Path == "." && e.Type != TypeDir && e.Type != TypeDirEnd {
		return fmt.Errorf("%w: the root of a tree is a %s", ErrFormat, e.Type)
	}
	if e.Size < 0 || (e.Size != 0 && e.Type != TypeFile) {
		return fmt.Errorf("%w: %s %q has size %d", ErrFormat, e.Type, e.Path, e.Size)
	}
	switch e.Type {
	case TypeDir, TypeDirEnd, TypeFile, TypeFIFO, TypeSocket:
		if e.Link != "" {
			return fmt.Errorf("%w: %s %q has a link target", ErrFormat, e.Type, e.Path)
		}
	case TypeSymlink:
		// A symbolic link may point anywhere: it is followed inside the container
		// only, never by the node.
		if e.Link == "" || len(e.Link) > 4095 || strings.ContainsRune(e.Link, 0) {
			return fmt.Errorf("%w: symbolic link %q has no usable target", ErrFormat, e.Path)
		}
	case TypeHardlink:
		if err := checkPath(e.Link); err != nil {
			return err
		}
	case TypeWhiteout:
		if kind != KindRootfs {
			return fmt.Errorf("%w: whiteout %q outside a writable layer", ErrFormat, e.Path)
		}
	default:
		return fmt.Errorf("%w: %q is of unknown type %q", ErrFormat, e.Path, e.Type)
	}
	for name := range e.Xattrs {
		if err := checkXattr(kind, name); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

func checkPath(p string) error {
	if p == "" || len(p) > 4095 || path.IsAbs(p) || path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../") || strings.ContainsRune(p, 0) {
		return fmt.Errorf("%w: path %q is not a clean path inside its tree", ErrFormat, p)
	}
	return nil
}

// OverlayOpaque marks a directory of a writable layer that hides the content of
// the layers below. It is the only attribute of the overlay file system that
// moves; the others describe inodes of one node.
const OverlayOpaque = "trusted.overlay.opaque"

// MovableXattr tells whether an extended attribute belongs to the content of a
// file, so that it has to move with it.
func MovableXattr(kind Kind, name string) bool {
	switch {
	case strings.HasPrefix(name, "user."), name == "security.capability",
		name == "system.posix_acl_access", name == "system.posix_acl_default":
		return true
	case name == OverlayOpaque:
		return kind == KindRootfs
	}
	return false
}

func checkXattr(kind Kind, name string) error {
	if !MovableXattr(kind, name) || len(name) > 255 || strings.ContainsRune(name, 0) {
		return fmt.Errorf("%w: extended attribute %q may not be set from a checkpoint", ErrFormat, name)
	}
	return nil
}
