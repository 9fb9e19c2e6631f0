package criu

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/utsns"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func image(t testing.TB, magic uint32, entries ...proto.Message) []byte {
	t.Helper()
	var b bytes.Buffer
	w := newImageWriter(&b, magic)
	for _, e := range entries {
		check(t, w.write(e))
	}
	check(t, w.flush())
	return b.Bytes()
}

func run(addr, pages uint64, flags uint32) *pagemap.PagemapEntry {
	return pagemapEntry(Run{Addr: addr, Pages: pages}, flags)
}

func pagemapOf(t testing.TB, id uint32, runs ...*pagemap.PagemapEntry) []byte {
	t.Helper()
	entries := []proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(id)}}
	for _, r := range runs {
		entries = append(entries, r)
	}
	return image(t, magicPagemap, entries...)
}

func runs(t testing.TB, b []byte) []Run {
	t.Helper()
	p, err := OpenPagemap(bytes.NewReader(b))
	check(t, err)
	var out []Run
	for {
		r, err := p.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		check(t, err)
		out = append(out, r)
	}
}

func TestComplete(t *testing.T) {
	in := pagemapOf(t, 7, run(0x1000, 2, pagePresent), run(0x3000, 1, pageLazy), run(0x9000, 5, pageLazy), run(0x20000, 1, pageLazy|pagePresent))
	var out bytes.Buffer
	check(t, Complete(bytes.NewReader(in), &out))
	got := runs(t, out.Bytes())
	want := []Run{{Addr: 0x1000, Pages: 3}, {Addr: 0x9000, Pages: 5}, {Addr: 0x20000, Pages: 1}}
	if len(got) != len(want) {
		t.Fatalf("%v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("run %d is %v, want %v", i, got[i], want[i])
		}
	}
}

func TestHostilePagemap(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   []byte
	}{
		{"empty", nil},
		{"another image", image(t, magicMM)},
		{"no head", image(t, magicPagemap)},
		{"cut off", pagemapOf(t, 1, run(0x1000, 1, pagePresent))[:20]},
		{"an entry of four gigabytes", append(pagemapOf(t, 1), 0xff, 0xff, 0xff, 0xff)},
		{"pages elsewhere", pagemapOf(t, 1, run(0x1000, 1, pageParent))},
		{"pages nowhere", pagemapOf(t, 1, run(0x1000, 1, 0))},
		{"an odd address", pagemapOf(t, 1, run(0x1001, 1, pagePresent))},
		{"no pages", pagemapOf(t, 1, run(0x1000, 0, pagePresent))},
		{"overlapping runs", pagemapOf(t, 1, run(0x1000, 2, pagePresent), run(0x2000, 1, pagePresent))},
		{"an overflow", pagemapOf(t, 1, run(0x1000, 1<<60, pagePresent))},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := Complete(bytes.NewReader(tc.in), io.Discard); !errors.Is(err, ErrImage) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestStore sends pages in several rounds, some of them again, some zero, in random
// order, and reads them back as CRIU would: in the order of the map, from the image set
// or its parent.
func TestStore(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, tc := range []struct {
		name   string
		rounds int
		random bool
		// gap leaves out pages of the first round.
		gap  func(k uint64) bool
		full bool // the map has all pages
		want bool // a parent
	}{
		{name: "one round in order", rounds: 1, full: true},
		{name: "one round of more than the map has", rounds: 1, want: true},
		{name: "pages sent again", rounds: 3, full: true},
		{name: "new pages behind the others", rounds: 1, gap: func(k uint64) bool { return k >= 250 }, full: true},
		{name: "new pages between the others", rounds: 3, gap: func(k uint64) bool { return k%7 == 3 }, full: true, want: true},
		{name: "new pages, others gone", rounds: 3, gap: func(k uint64) bool { return k%7 == 3 }, want: true},
		{name: "random order", rounds: 3, random: true, want: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := NewStore(dir, "1")
			check(t, err)
			gone, err := NewStore(dir, "7")
			check(t, err)
			check(t, gone.Pages(0, 0x1000, 1, bytes.Repeat([]byte{9}, checkpoint.PageSize)))
			const n = 300
			want := map[uint64]byte{}
			send := func(round uint32, k, count uint64) {
				c := byte(rnd.IntN(4))
				var b []byte
				if c != 0 {
					b = bytes.Repeat([]byte{c}, int(count)*checkpoint.PageSize)
				}
				check(t, s.Pages(round, 0x100000+k*checkpoint.PageSize, uint32(count), b))
				for j := range count {
					want[k+j] = c
				}
			}
			for round := range uint32(tc.rounds) {
				order := rnd.Perm(n)
				for i := range uint64(n) {
					k := i
					if tc.random {
						k = uint64(order[i])
					}
					switch {
					case round > 0 && rnd.IntN(3) > 0: // Later rounds send some runs only, of other lengths.
					case round > 0:
						send(round, k, min(uint64(rnd.IntN(5)+1), n-k))
					case tc.gap == nil || !tc.gap(k):
						send(round, k, 1)
					}
				}
			}
			for k := range uint64(n) {
				if _, ok := want[k]; !ok {
					send(uint32(tc.rounds), k, 1)
				}
			}
			pm := filepath.Join(dir, "pagemap-1.img")
			entries := []*pagemap.PagemapEntry{run(0x100000, n, pagePresent)}
			if !tc.full {
				entries = []*pagemap.PagemapEntry{run(0x100000, 100, pagePresent), run(0x100000+120*checkpoint.PageSize, 180, pagePresent)}
			}
			check(t, os.WriteFile(pm, pagemapOf(t, 5, entries...), 0o600))
			check(t, Place(dir, []*Store{s, gone}))
			got, parent := restored(t, dir)
			if parent != tc.want {
				t.Errorf("a parent: %v", parent)
			}
			for k := range uint64(n) {
				c, ok := got[0x100000+k*checkpoint.PageSize]
				if in := tc.full || k < 100 || k >= 120; ok != in {
					t.Fatalf("page %d is there: %v", k, ok)
				} else if in && c != want[k] {
					t.Fatalf("page %d is %d, not %d", k, c, want[k])
				}
			}
			files, err := os.ReadDir(dir)
			check(t, err)
			if len(files) > 3 {
				t.Errorf("left behind: %v", files)
			}
		})
	}
}

// restored reads the memory of process 1 the way CRIU does and returns the first byte
// of every page.
func restored(t *testing.T, dir string) (pages map[uint64]byte, parent bool) {
	t.Helper()
	level := func(dir string) (map[uint64]byte, []*pagemap.PagemapEntry) {
		f, err := os.Open(filepath.Join(dir, "pagemap-1.img"))
		check(t, err)
		defer f.Close()
		r, err := newImageReader(f, magicPagemap)
		check(t, err)
		var head pagemap.PagemapHead
		check(t, r.next(&head))
		content, err := os.ReadFile(filepath.Join(dir, PagesFile(head.GetPagesId())))
		check(t, err)
		out := map[uint64]byte{}
		var elsewhere []*pagemap.PagemapEntry
		for {
			e := new(pagemap.PagemapEntry)
			if err := r.next(e); errors.Is(err, io.EOF) {
				break
			} else {
				check(t, err)
			}
			if e.GetFlags() == pageParent {
				elsewhere = append(elsewhere, e)
				continue
			}
			for i := range uint64(e.GetNrPages()) {
				p := content[:checkpoint.PageSize]
				content = content[checkpoint.PageSize:]
				if !bytes.Equal(p, bytes.Repeat(p[:1], checkpoint.PageSize)) {
					t.Fatal("a page of two")
				}
				out[e.GetVaddr()+i*checkpoint.PageSize] = p[0]
			}
		}
		if len(content) != 0 {
			t.Errorf("%d bytes of %s are in no run", len(content), dir)
		}
		return out, elsewhere
	}
	pages, elsewhere := level(dir)
	if _, err := os.Stat(filepath.Join(dir, parentDir)); errors.Is(err, os.ErrNotExist) {
		return pages, false
	}
	base, none := level(filepath.Join(dir, parentDir))
	if len(none) != 0 {
		t.Error("the parent has a parent")
	}
	for _, e := range elsewhere {
		for i := range uint64(e.GetNrPages()) {
			addr := e.GetVaddr() + i*checkpoint.PageSize
			c, ok := base[addr]
			if !ok {
				t.Fatalf("the page at %#x is not in the parent", addr)
			}
			pages[addr] = c
		}
	}
	return pages, true
}

func TestStoreRefuses(t *testing.T) {
	dir := t.TempDir()
	store := func(name string) *Store {
		for _, f := range []string{name + ".base", name + ".rest", PagesFile(1)} {
			os.Remove(filepath.Join(dir, f))
		}
		s, err := NewStore(dir, name)
		check(t, err)
		check(t, s.Pages(0, 0x1000, 1, bytes.Repeat([]byte{1}, checkpoint.PageSize)))
		return s
	}
	put := func(name string, b []byte) { check(t, os.WriteFile(filepath.Join(dir, name), b, 0o600)) }
	put("pagemap-1.img", pagemapOf(t, 1, run(0x1000, 2, pagePresent)))
	if err := Place(dir, []*Store{store("1")}); !errors.Is(err, ErrImage) {
		t.Errorf("a page that never came: %v", err)
	}
	if err := Place(dir, []*Store{store("2")}); !errors.Is(err, ErrImage) {
		t.Errorf("a map without pages: %v", err)
	}
	put("pagemap-1.img", pagemapOf(t, 1, run(0x1000, 1, pagePresent)))
	put("pagemap-2.img", pagemapOf(t, 1, run(0x1000, 1, pagePresent)))
	if err := Place(dir, []*Store{store("1"), store("2")}); !errors.Is(err, ErrImage) {
		t.Errorf("two maps for one file: %v", err)
	}
	put("3.rest", nil)
	if _, err := NewStore(dir, "3"); err == nil {
		t.Error("a file was overwritten")
	}
}

func confinement() Confinement {
	return Confinement{
		Capabilities: 1 << 5, NoNewPrivs: true, Seccomp: true, AppArmor: "cri",
		Mounts: map[string]Mount{
			"/proc": {Type: "proc"}, "/dev": {Type: "tmpfs"}, "/sys": {Type: "sysfs", ReadOnly: true}, "/data": {Type: "bind"}, "/conf": {Type: "bind", ReadOnly: true},
		},
		ReadOnly: []string{"/proc/sys"}, Masked: []string{"/proc/keys"},
	}
}

func core(caps uint32, change func(*criucore.ThreadCoreEntry)) *criucore.CoreEntry {
	t := &criucore.ThreadCoreEntry{
		FutexRla: proto.Uint64(0), FutexRlaLen: proto.Uint32(0), SchedNice: proto.Int32(0), SchedPolicy: proto.Uint32(0),
		SeccompMode: criucore.SeccompMode_filter.Enum(),
		Creds: with(&creds.CredsEntry{
			Uid: proto.Uint32(0), Gid: proto.Uint32(0), Euid: proto.Uint32(0), Egid: proto.Uint32(0), Suid: proto.Uint32(0), Sgid: proto.Uint32(0),
			Fsuid: proto.Uint32(0), Fsgid: proto.Uint32(0), Secbits: proto.Uint32(0), CapEff: []uint32{caps, 0}, LsmProfile: proto.String("apparmor:cri (enforce)"),
		}, credsNoNewPrivs, 1),
	}
	if change != nil {
		change(t)
	}
	return &criucore.CoreEntry{Mtype: criucore.CoreEntry_X86_64.Enum(), ThreadCore: t}
}

func mountEntry(point string, fs mnt.Fstype, flags uint32, key string) *mnt.MntEntry {
	m := &mnt.MntEntry{
		Fstype: proto.Uint32(uint32(fs)), MntId: proto.Uint32(1), RootDev: proto.Uint32(1), ParentMntId: proto.Uint32(1), Flags: proto.Uint32(flags),
		Root: proto.String("/"), Mountpoint: proto.String(point), Source: proto.String("x"), Options: proto.String(""),
	}
	if key != "" {
		m.ExtKey = proto.String(key)
	}
	if point == "/proc/sys" {
		m.Root = proto.String("/sys")
	}
	return m
}

func TestCheck(t *testing.T) {
	plainCore := core(1<<5, nil)
	mounts := func(change map[string]*mnt.MntEntry) []proto.Message {
		all := []*mnt.MntEntry{
			mountEntry("/", mnt.Fstype_OVERLAYFS, 0, ""), mountEntry("/proc", mnt.Fstype_PROC, 0, ""), mountEntry("/dev", mnt.Fstype_TMPFS, 0, ""),
			mountEntry("/dev/null", mnt.Fstype_UNSUPPORTED, 0, "/dev/null"), mountEntry("/sys", mnt.Fstype_SYSFS, mountReadOnly, ""),
			mountEntry("/data", mnt.Fstype_UNSUPPORTED, 0, "/data"), mountEntry("/conf", mnt.Fstype_UNSUPPORTED, mountReadOnly, "/conf"),
			mountEntry("/proc/sys", mnt.Fstype_PROC, mountReadOnly, ""), mountEntry("/proc/keys", mnt.Fstype_UNSUPPORTED, 0, "/proc/keys"),
		}
		var out []proto.Message
		for _, m := range all {
			if c, ok := change[m.GetMountpoint()]; ok {
				if c != nil {
					out = append(out, c)
				}
				delete(change, m.GetMountpoint())
				continue
			}
			out = append(out, m)
		}
		for _, m := range change {
			out = append(out, m)
		}
		return out
	}
	one := func(m *mnt.MntEntry) []proto.Message {
		return mounts(map[string]*mnt.MntEntry{m.GetMountpoint(): m})
	}
	for _, tc := range []struct {
		name   string
		core   *criucore.CoreEntry
		mounts []proto.Message
		ok     bool
	}{
		{"what the container may", plainCore, mounts(nil), true},
		{"another capability", core(1<<21, nil), mounts(nil), false},
		{"a capability beyond those known", core(1<<5, func(c *criucore.ThreadCoreEntry) { c.Creds.CapPrm = []uint32{0, 0, 1} }), mounts(nil), false},
		{"new privileges", core(0, func(c *criucore.ThreadCoreEntry) { c.Creds.ProtoReflect().SetUnknown(nil) }), mounts(nil), false},
		{"new privileges, said last", core(0, func(c *criucore.ThreadCoreEntry) { with(c.Creds, credsNoNewPrivs, 0) }), mounts(nil), false},
		{"ambient capabilities", core(1<<5, func(c *criucore.ThreadCoreEntry) { with(c.Creds, credsAmbient, 1<<5, 0) }), mounts(nil), true},
		{"another ambient capability", core(1<<5, func(c *criucore.ThreadCoreEntry) { with(c.Creds, credsAmbient, 0, 1<<3) }), mounts(nil), false},
		{"another ambient capability, packed", core(1<<5, func(c *criucore.ThreadCoreEntry) {
			b := protowire.AppendTag(c.Creds.ProtoReflect().GetUnknown(), credsAmbient, protowire.BytesType)
			c.Creds.ProtoReflect().SetUnknown(protowire.AppendBytes(b, []byte{0, 1 << 3}))
		}), mounts(nil), false},
		{"no seccomp filter", core(0, func(c *criucore.ThreadCoreEntry) { c.SeccompMode = nil }), mounts(nil), false},
		{"another AppArmor profile", core(0, func(c *criucore.ThreadCoreEntry) { c.Creds.LsmProfile = proto.String("apparmor:unconfined") }), mounts(nil), false},
		{"a mount that nobody described", plainCore, one(mountEntry("/mnt", mnt.Fstype_TMPFS, 0, "")), false},
		{"a disk instead of /proc", plainCore, one(mountEntry("/proc", mnt.Fstype_AUTO, 0, "")), false},
		{"a writable /sys", plainCore, one(mountEntry("/sys", mnt.Fstype_SYSFS, 0, "")), false},
		{"a writable /proc/sys", plainCore, one(mountEntry("/proc/sys", mnt.Fstype_PROC, 0, "")), false},
		{"a fresh /proc on a masked path", plainCore, one(mountEntry("/proc/keys", mnt.Fstype_PROC, 0, "")), false},
		{"a volume that is not mounted from the node", plainCore, one(mountEntry("/data", mnt.Fstype_TMPFS, 0, "")), false},
		{"a writable configuration", plainCore, one(mountEntry("/conf", mnt.Fstype_UNSUPPORTED, 0, "/conf")), false},
		{"a second /sys on the first", plainCore, append(mounts(nil), mountEntry("/sys", mnt.Fstype_SYSFS, 0, "")), false},
		{"an uncovered /proc/sys", plainCore, mounts(map[string]*mnt.MntEntry{"/proc/sys": nil}), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			check(t, os.WriteFile(filepath.Join(dir, "core-1.img"), image(t, magicCore, tc.core), 0o600))
			check(t, os.WriteFile(filepath.Join(dir, "mountpoints-13.img"), image(t, magicMount, tc.mounts...), 0o600))
			check(t, os.WriteFile(filepath.Join(dir, "descriptors.json"), []byte(`["/dev/null","pipe:[1]","pipe:[2]"]`), 0o600))
			err := Check(dir, confinement())
			if tc.ok && err != nil || !tc.ok && !errors.Is(err, ErrConfinement) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestDescriptors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "descriptors.json")
	for s, ok := range map[string]bool{`["/dev/null","pipe:[1]","pipe:[2]"]`: true, `["a","b","c","pipe:[3]"]`: false, `{}`: false} {
		check(t, os.WriteFile(file, []byte(s), 0o600))
		if err := checkDescriptors(file); (err == nil) != ok {
			t.Errorf("%s: %v", s, err)
		}
	}
}

func TestIPC(t *testing.T) {
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "ipcns-shm-11.img"), append(image(t, 0x46283044), 1, 2, 3, 4), 0o600))
	check(t, os.WriteFile(filepath.Join(dir, "ipcns-sem-11.img"), image(t, 0x59573019), 0o600))
	for _, want := range []bool{true, false} {
		objects, mapped, err := IPC(dir)
		if err != nil || mapped || objects != want {
			t.Errorf("objects %v, mapped %v, %v", objects, mapped, err)
		}
		check(t, DropIPC(dir))
	}
}

func FuzzPagemap(f *testing.F) {
	f.Add(pagemapOf(f, 1, run(0x1000, 2, pagePresent), run(0x9000, 1, pageLazy)))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		if Complete(bytes.NewReader(b), &out) == nil {
			if err := Complete(&out, io.Discard); err != nil {
				t.Errorf("a completed map is invalid: %v", err)
			}
		}
	})
}

func FuzzCheck(f *testing.F) {
	f.Add(image(f, magicCore, core(0, nil)), image(f, magicMount, mountEntry("/", mnt.Fstype_OVERLAYFS, 0, "")))
	f.Fuzz(func(t *testing.T, core, mounts []byte) {
		dir := t.TempDir()
		check(t, os.WriteFile(filepath.Join(dir, "core-1.img"), core, 0o600))
		check(t, os.WriteFile(filepath.Join(dir, "mountpoints-1.img"), mounts, 0o600))
		check(t, os.WriteFile(filepath.Join(dir, "descriptors.json"), []byte("[]"), 0o600))
		_ = Check(dir, confinement())
	})
}

func TestSetHostName(t *testing.T) {
	dir := t.TempDir()
	entry := func(host, domain string) []byte {
		return image(t, magicUTS, &utsns.UtsnsEntry{Nodename: proto.String(host), Domainname: proto.String(domain)})
	}
	put := func(name string, b []byte) { check(t, os.WriteFile(filepath.Join(dir, name), b, 0o600)) }
	put("utsns-11.img", entry("source", "(none)"))
	put("utsns-12.img", []byte("no image at all"))
	put("inventory.img", []byte("kept"))
	check(t, SetHostName(dir, "target", "example"))
	for name, want := range map[string][]byte{"utsns-11.img": entry("target", "example"), "utsns-12.img": entry("target", "example"), "inventory.img": []byte("kept")} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s holds %q, %v", name, got, err)
		}
	}
}
