package criu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"google.golang.org/protobuf/proto"
)

const (
	magicCore  = 0x55053847
	magicMount = 0x55563928

	mountReadOnly = 1 // MS_RDONLY
)

// Confinement is what the description of a container allows its processes. CRIU
// restores credentials and mounts from the images, as root; Check refuses images
// that hold more than that.
type Confinement struct {
	// Capabilities is the bounding set.
	Capabilities uint64
	NoNewPrivs   bool
	// Seccomp is set when the processes have to be under a filter.
	Seccomp bool
	// AppArmor is the profile of the container, empty when it has none.
	AppArmor string
	// ReadOnlyRoot is set for a read-only root file system.
	ReadOnlyRoot bool
	// Mounts are the destinations of the mounts.
	Mounts map[string]Mount
	// ReadOnly and Masked are paths below the mounts that are covered.
	ReadOnly, Masked []string
}

// Mount is one mount of a container.
type Mount struct {
	Type     string
	ReadOnly bool
}

// ErrConfinement is wrapped when images hold more rights than the container has.
var ErrConfinement = errors.New("the checkpoint asks for more than the container may")

// Check compares an image set with the container it is meant for.
func Check(images string, c Confinement) error {
	if err := checkDescriptors(filepath.Join(images, "descriptors.json")); err != nil {
		return err
	}
	files, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	tables := 0
	for _, e := range files {
		p := filepath.Join(images, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "core-"):
			err = each(p, magicCore, func() *criucore.CoreEntry { return new(criucore.CoreEntry) }, c.core)
		case strings.HasPrefix(e.Name(), "mountpoints-"):
			tables++
			err = c.mounts(p)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	// A second table would be a mount namespace that nobody described.
	if tables != 1 {
		return fmt.Errorf("%w: it has %d mount namespaces, one is possible", ErrConfinement, tables)
	}
	return nil
}

func (c Confinement) core(e *criucore.CoreEntry) error {
	t := e.GetThreadCore()
	if t == nil {
		return nil // A zombie has no credentials.
	}
	cr := t.GetCreds()
	var ambient []uint32
	for _, w := range numbers(cr, credsAmbient) {
		ambient = append(ambient, uint32(w))
	}
	for name, set := range map[string][]uint32{
		"permitted": cr.GetCapPrm(), "effective": cr.GetCapEff(), "inheritable": cr.GetCapInh(), "bounding": cr.GetCapBnd(), "ambient": ambient,
	} {
		var have uint64
		for i, w := range set {
			if i > 1 && w != 0 {
				return fmt.Errorf("%w: unknown capabilities", ErrConfinement)
			}
			have |= uint64(w) << (32 * (i & 1))
		}
		if extra := have &^ c.Capabilities; extra != 0 {
			return fmt.Errorf("%w: %s capabilities %#x", ErrConfinement, name, extra)
		}
	}
	if nnp, _ := last(cr, credsNoNewPrivs); c.NoNewPrivs && uint32(nnp) == 0 {
		return fmt.Errorf("%w: a process without no_new_privs", ErrConfinement)
	}
	if mode := t.GetSeccompMode(); c.Seccomp && mode != criucore.SeccompMode_filter && mode != criucore.SeccompMode_strict {
		return fmt.Errorf("%w: a process without a seccomp filter", ErrConfinement)
	}
	if c.AppArmor != "" && profile(cr.GetLsmProfile()) != c.AppArmor {
		return fmt.Errorf("%w: AppArmor profile %q instead of %q", ErrConfinement, cr.GetLsmProfile(), c.AppArmor)
	}
	return nil
}

// checkDescriptors reads what runc keeps beside CRIU's images: the standard streams
// of the first process. Pipes are joined with those of the new container; further
// entries would be other files that runc has open.
func checkDescriptors(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var fds []string
	if err := json.Unmarshal(b, &fds); err != nil || len(fds) > 3 {
		return fmt.Errorf("%w: descriptors.json does not describe three streams", ErrImage)
	}
	return nil
}

// profile takes the mode off an AppArmor label.
func profile(label string) string {
	label = strings.TrimPrefix(label, "apparmor:")
	name, _, _ := strings.Cut(label, " (")
	return name
}

func (c Confinement) mounts(file string) error {
	have := map[string]bool{} // by mount point, whether it is read-only
	err := each(file, magicMount, func() *mnt.MntEntry { return new(mnt.MntEntry) }, func(m *mnt.MntEntry) error {
		point := path.Clean("/" + m.GetMountpoint())
		ro := m.GetFlags()&mountReadOnly != 0 || m.GetSbFlags()&mountReadOnly != 0
		// Of several mounts on one point the weakest counts.
		if before, ok := have[point]; ok && !before {
			ro = false
		}
		have[point] = ro
		return c.mount(point, m, ro)
	})
	if err != nil {
		return err
	}
	// A path that the source's kernel does not have is not covered in its images.
	for _, p := range c.ReadOnly {
		if ro, ok := have[p]; ok && !ro {
			return fmt.Errorf("%w: %s is writable", ErrConfinement, p)
		} else if !ok && dangerous(p) {
			return fmt.Errorf("%w: %s is not read-only", ErrConfinement, p)
		}
	}
	for _, p := range c.Masked {
		if _, ok := have[p]; !ok && dangerous(p) {
			return fmt.Errorf("%w: %s is not masked", ErrConfinement, p)
		}
	}
	return nil
}

// dangerous tells whether a path that this node has must be covered: those with
// which a container could reach its node.
func dangerous(p string) bool {
	switch p {
	case "/proc/sys", "/proc/sysrq-trigger", "/proc/kcore":
		_, err := os.Lstat(p)
		return err == nil
	}
	return false
}

func (c Confinement) mount(point string, m *mnt.MntEntry, ro bool) error {
	if point == "/" {
		if c.ReadOnlyRoot && !ro {
			return fmt.Errorf("%w: the root file system is writable", ErrConfinement)
		}
		return nil
	}
	want, known := c.Mounts[point]
	for _, p := range c.Masked {
		if point == p && m.GetExtKey() == "" && m.GetFstype() != uint32(mnt.Fstype_TMPFS) {
			return fmt.Errorf("%w: %s is not masked", ErrConfinement, p)
		} else if point == p {
			return nil
		}
	}
	for _, p := range c.ReadOnly {
		if point == p && m.GetExtKey() == "" && path.Clean("/"+m.GetRoot()) != strings.TrimPrefix(p, "/proc") {
			return fmt.Errorf("%w: %s is another file than itself", ErrConfinement, p)
		} else if point == p {
			return nil
		}
	}
	if !known {
		// runc gives default devices and the controllers of version 1 as mounts of
		// their own.
		if parent, ok := c.Mounts[path.Dir(point)]; ok && (parent.Type == "cgroup" || path.Dir(point) == "/dev" && m.GetExtKey() != "") {
			if parent.Type == "cgroup" && parent.ReadOnly && !ro {
				return fmt.Errorf("%w: %s is writable", ErrConfinement, point)
			}
			return nil
		}
		return fmt.Errorf("%w: something is mounted on %s", ErrConfinement, point)
	}
	// The directory around the controllers of version 1 is an empty tmpfs, which
	// runc leaves writable.
	if want.ReadOnly && !ro && (want.Type != "cgroup" || m.GetFstype() != uint32(mnt.Fstype_TMPFS)) {
		return fmt.Errorf("%w: %s is writable", ErrConfinement, point)
	}
	if want.Type == "bind" {
		if m.GetExtKey() == "" {
			return fmt.Errorf("%w: %s is not mounted from the node", ErrConfinement, point)
		}
		return nil // What is mounted there is decided by this node.
	}
	if allowed, ok := fileSystems[want.Type]; !ok || !allowed[mnt.Fstype(m.GetFstype())] {
		return fmt.Errorf("%w: %s is mounted as another file system than %s", ErrConfinement, point, want.Type)
	}
	return nil
}

var fileSystems = map[string]map[mnt.Fstype]bool{
	"proc":   {mnt.Fstype_PROC: true},
	"sysfs":  {mnt.Fstype_SYSFS: true},
	"tmpfs":  {mnt.Fstype_TMPFS: true},
	"devpts": {mnt.Fstype_DEVPTS: true},
	"mqueue": {mnt.Fstype_MQUEUE: true},
	"cgroup": {mnt.Fstype_CGROUP: true, mnt.Fstype_CGROUP2: true, mnt.Fstype_TMPFS: true},
}

// each calls f for every entry of an image.
func each[T proto.Message](file string, magic uint32, fresh func() T, f func(T) error) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	r, err := newImageReader(in, magic)
	if err != nil {
		return err
	}
	for {
		m := fresh()
		if err := r.next(m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := f(m); err != nil {
			return err
		}
	}
}
