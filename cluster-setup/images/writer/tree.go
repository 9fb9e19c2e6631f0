package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stamp is when everything in the tree was last changed.
var stamp = time.Date(2020, 2, 29, 12, 0, 0, 123456789, time.UTC)

// holes is the length of a file of which nearly nothing is stored.
const holes = 1 << 30

// prepareTree changes a folder of the image in every way in which a writable layer differs from its image.
func prepareTree(dir string) error {
	in := func(name string) string { return filepath.Join(dir, name) }
	appended, err := os.OpenFile(in("appended"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer appended.Close()
	if _, err := appended.WriteString("and a line more\n"); err != nil {
		return err
	}
	sparse, err := os.Create(in("sparse"))
	if err != nil {
		return err
	}
	defer sparse.Close()
	if _, err := sparse.WriteAt([]byte("end"), holes-3); err != nil {
		return err
	}
	for _, err := range []error{
		os.Remove(in("removed")),
		os.Rename(in("renamed"), in("new-name")),
		// A folder of the image that goes and comes again hides what the image has in it.
		os.RemoveAll(in("sub")),
		os.Mkdir(in("sub"), 0o750),
		os.WriteFile(in("sub/three"), []byte("three\n"), 0o640),
		os.Symlink("sub/three", in("link")),
		os.Link(in("sub/three"), in("hard")),
		os.Lchown(in("sub/three"), 1234, 5678),
		// A change of the owner may take the bit away, so it comes later.
		os.Chmod(in("sub/three"), 0o640|os.ModeSetgid),
		unix.Mkfifo(in("fifo"), 0o600),
		os.Chtimes(in("sub/three"), stamp, stamp),
		os.Chtimes(in("appended"), stamp, stamp),
		os.Chtimes(in("sub"), stamp, stamp),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

// compareTree looks whether everything is as prepareTree has left it.
func compareTree(dir string) error {
	in := func(name string) string { return filepath.Join(dir, name) }
	var names []string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(path, dir))
		return err
	})
	if err != nil {
		return err
	}
	want := []string{"", "/appended", "/fifo", "/hard", "/link", "/new-name", "/sparse", "/sub", "/sub/three"}
	if !slices.Equal(names, want) {
		return fmt.Errorf("there are %q", names)
	}
	for name, content := range map[string]string{
		"appended": "appended as it is in the image\nand a line more\n", "new-name": "renamed as it is in the image\n",
		"sub/three": "three\n", "link": "three\n", "hard": "three\n",
	} {
		b, err := os.ReadFile(in(name))
		if err != nil {
			return err
		}
		if string(b) != content {
			return fmt.Errorf("%s has %q", name, b)
		}
	}
	var three, hard, sparse, fifo unix.Stat_t
	for name, st := range map[string]*unix.Stat_t{"sub/three": &three, "hard": &hard, "sparse": &sparse, "fifo": &fifo} {
		if err := unix.Lstat(in(name), st); err != nil {
			return err
		}
	}
	switch {
	case three.Mode&0o7777 != 0o2640 || three.Uid != 1234 || three.Gid != 5678:
		return fmt.Errorf("sub/three has mode %o, owner %d, group %d", three.Mode, three.Uid, three.Gid)
	case three.Ino != hard.Ino || three.Nlink != 2:
		return fmt.Errorf("sub/three and hard are files %d and %d with %d names", three.Ino, hard.Ino, three.Nlink)
	case sparse.Size != holes || sparse.Blocks*512 > 1<<20:
		return fmt.Errorf("sparse has %d bytes in %d blocks", sparse.Size, sparse.Blocks)
	case fifo.Mode&unix.S_IFMT != unix.S_IFIFO:
		return fmt.Errorf("fifo has mode %o", fifo.Mode)
	}
	for _, name := range []string{"sub/three", "appended", "sub"} {
		st, err := os.Stat(in(name))
		if err != nil {
			return err
		}
		if !st.ModTime().Equal(stamp) {
			return fmt.Errorf("%s was changed at %s", name, st.ModTime())
		}
	}
	return nil
}
