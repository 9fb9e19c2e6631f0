package tree

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// sink gives the entries of one part to a receiver.
type sink struct {
	dir  string
	kind checkpoint.Kind
}

func (s sink) Begin(checkpoint.Part) (checkpoint.PartSink, error) { return Receive(s.dir, s.kind) }
func (s sink) Round(checkpoint.Round) error                       { return nil }

func part(kind checkpoint.Kind) checkpoint.Part {
	if kind == checkpoint.KindRootfs {
		return checkpoint.Part{Kind: kind, Container: "a"}
	}
	return checkpoint.Part{Kind: kind, Name: "data"}
}

func copyTree(t *testing.T, from, to string, kind checkpoint.Kind) error {
	t.Helper()
	var b bytes.Buffer
	w, err := checkpoint.NewWriter(&b, "s")
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Begin(part(kind))
	if err != nil {
		t.Fatal(err)
	}
	if err := Send(t.Context(), from, kind, p); err != nil {
		return err
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(&checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}}); err != nil {
		t.Fatal(err)
	}
	_, err = checkpoint.Read(&b, "s", sink{to, kind}, checkpoint.Limits{})
	return err
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// describe lists everything about a tree that has to survive.
func describe(t *testing.T, root string) string {
	t.Helper()
	var out []string
	inodes := map[uint64]string{}
	do(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(p, root)
		line := fmt.Sprintf("%s %o %d:%d", name, st.Mode, st.Uid, st.Gid)
		line += fmt.Sprintf(" mtime %d", st.Mtim.Nano())
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d bytes %x, blocks below size: %v", len(b), hash(b), st.Blocks*512 < st.Size)
			if first, ok := inodes[st.Ino]; ok {
				line += " is " + first
			} else if st.Nlink > 1 {
				inodes[st.Ino] = name
			}
			x := make([]byte, 100)
			if n, err := unix.Lgetxattr(p, "user.test", x); err == nil {
				line += " user.test=" + string(x[:n])
			}
		case unix.S_IFLNK:
			l, _ := os.Readlink(p)
			line += " -> " + l
		}
		out = append(out, line)
		return nil
	}))
	sort.Strings(out)
	return strings.Join(out, "\n")
}

func hash(b []byte) (h uint64) {
	for _, c := range b {
		h = h*1099511628211 + uint64(c)
	}
	return h
}

func TestRoundTrip(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	p := func(name string) string { return filepath.Join(from, name) }
	do(t, os.Mkdir(p("dir"), 0o750))
	do(t, os.WriteFile(p("dir/file"), []byte("content"), 0o640))
	do(t, os.Chmod(p("dir/file"), 0o4711|os.ModeSetuid))
	do(t, os.Link(p("dir/file"), p("link")))
	do(t, os.Symlink("/etc/passwd", p("symlink")))
	do(t, unix.Mkfifo(p("fifo"), 0o622))
	do(t, unix.Mknod(p("socket"), unix.S_IFSOCK|0o755, 0))
	do(t, os.WriteFile(p("empty"), nil, 0o600))
	big := bytes.Repeat([]byte("0123456789abcdef"), 3*checkpoint.MaxData/16+1)
	do(t, os.WriteFile(p("big"), big, 0o600))
	f, err := os.Create(p("sparse"))
	do(t, err)
	_, err = f.WriteAt([]byte("x"), 5<<20)
	do(t, err)
	do(t, f.Truncate(20<<20))
	do(t, f.Close())
	do(t, unix.Lsetxattr(p("big"), "user.test", []byte("value"), 0))
	do(t, os.Mkdir(p("dir/old"), 0o700))
	old := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	for _, n := range []string{"dir/file", "big", "dir/old", "dir"} {
		do(t, os.Chtimes(p(n), old, old))
	}

	do(t, copyTree(t, from, to, checkpoint.KindVolume))

	want, got := describe(t, from), describe(t, to)
	if want != got {
		t.Errorf("the copy differs\nwant:\n%s\n\ngot:\n%s", want, got)
	}
	n, err := Size(t.Context(), to)
	if err != nil || n < uint64(len(big)) || n > 20<<20 {
		t.Errorf("size %d, %v", n, err)
	}
}

// TestReplaces: the target's directory is not empty.
func TestReplaces(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	do(t, os.Mkdir(filepath.Join(from, "dir"), 0o755))
	do(t, os.WriteFile(filepath.Join(from, "dir/f"), []byte("new"), 0o644))
	do(t, os.WriteFile(filepath.Join(from, "g"), []byte("new"), 0o644))
	do(t, os.Mkdir(filepath.Join(to, "dir"), 0o700))
	outside := filepath.Join(t.TempDir(), "outside")
	do(t, os.WriteFile(outside, []byte("old"), 0o644))
	do(t, os.Symlink(outside, filepath.Join(to, "g")))
	do(t, os.Link(outside, filepath.Join(to, "dir/f")))
	do(t, copyTree(t, from, to, checkpoint.KindVolume))
	for _, n := range []string{"g", "dir/f"} {
		if b, err := os.ReadFile(filepath.Join(to, n)); err != nil || string(b) != "new" {
			t.Errorf("%s is %q, %v", n, b, err)
		}
	}
	if b, _ := os.ReadFile(outside); string(b) != "old" {
		t.Error("a file outside was written through a link")
	}
}

// TestHostile gives the receiver entries that the reader lets pass but that meet a
// tree prepared for an escape.
func TestHostile(t *testing.T) {
	for _, tc := range []struct {
		name    string
		entries []checkpoint.Entry
	}{
		{"a file through a link", []checkpoint.Entry{{Path: "l", Type: checkpoint.TypeSymlink, Link: "/tmp"}, {Path: "l/f", Type: checkpoint.TypeFile}}},
		{"a directory through a link", []checkpoint.Entry{{Path: "l", Type: checkpoint.TypeSymlink, Link: ".."}, {Path: "l/d", Type: checkpoint.TypeDir}}},
		{"a directory over a link", []checkpoint.Entry{{Path: "l", Type: checkpoint.TypeSymlink, Link: "/tmp"}, {Path: "l", Type: checkpoint.TypeDir}}},
		{"times through a link", []checkpoint.Entry{{Path: "l", Type: checkpoint.TypeSymlink, Link: "/tmp"}, {Path: "l", Type: checkpoint.TypeDirEnd}}},
		{"a hard link through a link", []checkpoint.Entry{{Path: "l", Type: checkpoint.TypeSymlink, Link: "/etc"}, {Path: "h", Type: checkpoint.TypeHardlink, Link: "l/passwd"}}},
		{"a file over a directory", []checkpoint.Entry{{Path: "d", Type: checkpoint.TypeDir, Mode: 0o755}, {Path: "d", Type: checkpoint.TypeFile}}},
		{"a file below a file", []checkpoint.Entry{{Path: "f", Type: checkpoint.TypeFile}, {Path: "f/g", Type: checkpoint.TypeFile}}},
		{"a file in no directory", []checkpoint.Entry{{Path: "none/f", Type: checkpoint.TypeFile}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := Receive(t.TempDir(), checkpoint.KindVolume)
			do(t, err)
			defer r.Abort()
			for _, e := range tc.entries {
				e.UID, e.GID = uint32(os.Getuid()), uint32(os.Getgid())
				if err = r.Entry(&e); err != nil {
					return
				}
			}
			t.Error("accepted")
		})
	}
}

func TestDataOutsideFile(t *testing.T) {
	r, err := Receive(t.TempDir(), checkpoint.KindVolume)
	do(t, err)
	defer r.Abort()
	if err := r.Data(0, []byte("x")); !errors.Is(err, checkpoint.ErrFormat) {
		t.Errorf("error %v", err)
	}
}

func TestNoDirectory(t *testing.T) {
	dir := t.TempDir()
	do(t, os.Symlink("/tmp", filepath.Join(dir, "l")))
	for _, n := range []string{"l", "none"} {
		if r, err := Receive(filepath.Join(dir, n), checkpoint.KindVolume); err == nil {
			r.Abort()
			t.Errorf("%s was taken for a directory", n)
		}
	}
	if err := copyTree(t, filepath.Join(dir, "none"), dir, checkpoint.KindVolume); err == nil {
		t.Error("a tree that does not exist was sent")
	}
}

// dirSink is a sink that must not lead out of its directory, whatever the stream.
type dirSink struct{ dir string }

func (s dirSink) Begin(p checkpoint.Part) (checkpoint.PartSink, error) { return Receive(s.dir, p.Kind) }
func (s dirSink) Round(checkpoint.Round) error                         { return nil }

// FuzzReceive: no stream may change anything beside the directory it is for.
func FuzzReceive(f *testing.F) {
	seed := func(entries ...checkpoint.Entry) {
		var b bytes.Buffer
		w, err := checkpoint.NewWriter(&b, "s")
		if err != nil {
			f.Fatal(err)
		}
		p, err := w.Begin(part(checkpoint.KindVolume))
		if err != nil {
			f.Fatal(err)
		}
		for _, e := range entries {
			e.UID, e.GID = uint32(os.Getuid()), uint32(os.Getgid())
			if err := p.Entry(&e); err != nil {
				f.Fatal(err)
			}
			if e.Size > 0 {
				if err := p.Data(0, make([]byte, e.Size)); err != nil {
					f.Fatal(err)
				}
			}
		}
		f.Add(b.Bytes())
	}
	seed(checkpoint.Entry{Path: "d", Type: checkpoint.TypeDir, Mode: 0o755}, checkpoint.Entry{Path: "d/f", Type: checkpoint.TypeFile, Mode: 0o644, Size: 3})
	seed(checkpoint.Entry{Path: "l", Type: checkpoint.TypeSymlink, Link: ".."}, checkpoint.Entry{Path: "l/canary", Type: checkpoint.TypeFile})
	seed(checkpoint.Entry{Path: "l", Type: checkpoint.TypeSymlink, Link: "../canary"}, checkpoint.Entry{Path: "l", Type: checkpoint.TypeFile, Mode: 0o600, Size: 1})
	seed(checkpoint.Entry{Path: "l", Type: checkpoint.TypeSymlink, Link: ".."}, checkpoint.Entry{Path: "h", Type: checkpoint.TypeHardlink, Link: "l/canary"})
	f.Fuzz(func(t *testing.T, b []byte) {
		outer := t.TempDir()
		inner, canary := filepath.Join(outer, "inner"), filepath.Join(outer, "canary")
		do(t, os.Mkdir(inner, 0o755))
		do(t, os.WriteFile(canary, []byte("untouched"), 0o640))
		before := describe(t, canary)
		_, _ = checkpoint.Read(bytes.NewReader(b), "s", dirSink{inner}, checkpoint.Limits{Bytes: 1 << 20})
		if after := describe(t, canary); after != before {
			t.Errorf("a file outside has changed: %s, it was %s", after, before)
		}
		if left, err := os.ReadDir(outer); err != nil || len(left) != 2 {
			t.Errorf("%v, %v beside the directory", left, err)
		}
	})
}
