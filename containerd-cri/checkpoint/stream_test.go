package checkpoint

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
)

// memorySink keeps everything it is given.
type memorySink struct {
	parts  map[Part]*memoryPart
	rounds []Round
	refuse func(Part) error
}

type memoryPart struct {
	entries []Entry
	data    map[int64]string
	pages   map[uint64]string
	closed  bool
}

func newSink() *memorySink { return &memorySink{parts: map[Part]*memoryPart{}} }

func (m *memorySink) Begin(p Part) (PartSink, error) {
	if m.refuse != nil {
		if err := m.refuse(p); err != nil {
			return nil, err
		}
	}
	mp := &memoryPart{data: map[int64]string{}, pages: map[uint64]string{}}
	m.parts[p] = mp
	return mp, nil
}

func (m *memorySink) Round(r Round) error {
	m.rounds = append(m.rounds, r)
	return nil
}

func (m *memoryPart) Entry(e *Entry) error           { m.entries = append(m.entries, *e); return nil }
func (m *memoryPart) Data(off int64, b []byte) error { m.data[off] = string(b); return nil }
func (m *memoryPart) Close() error                   { m.closed = true; return nil }
func (m *memoryPart) Pages(_ uint32, addr uint64, n uint32, b []byte) error {
	if b == nil {
		b = make([]byte, int(min(n, 16))*PageSize)
	}
	m.pages[addr] = string(b)
	return nil
}

const testSession = "session-1"

var (
	imagePart = Part{Kind: KindImage, Container: "a", Name: "inventory.img"}
	pagesPart = Part{Kind: KindPages, Container: "a", Name: "pages-1.img"}
	rootPart  = Part{Kind: KindRootfs, Container: "a"}
	dataPart  = Part{Kind: KindVolume, Name: "data"}
)

func page(c byte) []byte { return bytes.Repeat([]byte{c}, PageSize) }

// stream writes a small valid stream.
func stream(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, testSession)
	check(t, err)
	image, err := w.Begin(imagePart)
	check(t, err)
	pages, err := w.Begin(pagesPart)
	check(t, err)
	check(t, image.Data(0, []byte("image")))
	check(t, pages.Pages(0, 0x10000, append(page(1), page(2)...)))
	check(t, w.Round(Round{Number: 0, Pages: 2}))
	check(t, pages.Pages(1, 0x11000, page(3)))
	check(t, pages.ZeroPages(1, 0x20000, 4))
	check(t, image.Close())
	check(t, pages.Close())
	check(t, w.Round(Round{Number: 1, Final: true, Pages: 5}))
	root, err := w.Begin(rootPart)
	check(t, err)
	check(t, root.Entry(&Entry{Path: ".", Type: TypeDir, Mode: 0o755}))
	check(t, root.Entry(&Entry{Path: "f", Type: TypeFile, Size: 10}))
	check(t, root.Data(4, []byte("123456")))
	check(t, root.Entry(&Entry{Path: "gone", Type: TypeWhiteout}))
	check(t, root.Close())
	_, err = w.Finish(manifest())
	check(t, err)
	if w.Bytes() != uint64(b.Len()) {
		t.Errorf("%d bytes counted, %d written", w.Bytes(), b.Len())
	}
	return b.Bytes()
}

func manifest() *Manifest {
	return &Manifest{FrozenAt: 1, Containers: []Container{{Name: "a", ImageID: "sha256:1"}}}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	b := stream(t)
	sink := newSink()
	// What follows a stream is not read.
	res, err := Read(io.MultiReader(bytes.NewReader(b), iotestErr{}), testSession, sink, Limits{})
	check(t, err)
	if res.Bytes != uint64(len(b)) || len(res.Digest) != 64 || len(res.Manifest.Parts) != 3 || len(res.Manifest.Rounds) != 2 {
		t.Errorf("result %+v", res)
	}
	if got := sink.parts[imagePart].data[0]; got != "image" {
		t.Errorf("image is %q", got)
	}
	pages := sink.parts[pagesPart].pages
	if pages[0x11000] != string(page(3)) || pages[0x10000] != string(append(page(1), page(2)...)) || len(pages[0x20000]) != 4*PageSize {
		t.Error("pages differ")
	}
	root := sink.parts[rootPart]
	if len(root.entries) != 3 || root.data[4] != "123456" || !root.closed {
		t.Errorf("tree is %+v", root)
	}
}

// iotestErr fails when it is read.
type iotestErr struct{}

func (iotestErr) Read([]byte) (int, error) { return 0, errors.New("read beyond the end") }

func TestParallelParts(t *testing.T) {
	var b bytes.Buffer
	w, err := NewWriter(&b, testSession)
	check(t, err)
	m := &Manifest{}
	var wg sync.WaitGroup
	for i := range 8 {
		name := fmt.Sprint("c", i)
		m.Containers = append(m.Containers, Container{Name: name})
		wg.Add(1)
		go func() {
			defer wg.Done()
			for k := range 20 {
				p, err := w.Begin(Part{Kind: KindImage, Container: name, Name: fmt.Sprint(k)})
				if err == nil {
					err = errors.Join(p.Data(0, []byte(name)), p.Data(2, make([]byte, 3*MaxData/2)), p.Close())
				}
				if err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	_, err = w.Finish(m)
	check(t, err)
	_, err = Read(&b, testSession, newSink(), Limits{})
	check(t, err)
}

// TestEveryByteCounts flips every byte of a stream: no change may go unnoticed. Of
// the equal bytes of a page it takes the first.
func TestEveryByteCounts(t *testing.T) {
	b := stream(t)
	for i := range b {
		if i > 3 && b[i] == b[i-1] && b[i] == b[i-2] && b[i] == b[i-3] {
			continue
		}
		for _, bit := range []byte{1, 0x20} {
			changed := slices.Clone(b)
			changed[i] ^= bit
			if _, err := Read(bytes.NewReader(changed), testSession, newSink(), Limits{}); err == nil {
				t.Fatalf("a change of byte %d of %d went unnoticed", i, len(b))
			}
		}
	}
}

func TestTruncated(t *testing.T) {
	b := stream(t)
	for n := 0; n < len(b); n += 1 + n/64 {
		if _, err := Read(bytes.NewReader(b[:n]), testSession, newSink(), Limits{}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("a stream cut after %d bytes: %v", n, err)
		}
	}
}

// raw builds streams that the Writer would not write.
type raw struct{ bytes.Buffer }

func newRaw() *raw {
	r := &raw{}
	r.WriteString(magic)
	r.u32(Version)
	r.u32(uint32(len(testSession)))
	r.WriteString(testSession)
	return r
}

func (r *raw) u32(v uint32) { _ = binary.Write(r, binary.LittleEndian, v) }

func (r *raw) frame(typ frameType, part uint32, payload []byte) *raw {
	var h [frameHeader]byte
	frame{typ: typ, part: part, size: uint32(len(payload))}.put(h[:])
	r.Write(h[:])
	r.Write(payload)
	return r
}

func (r *raw) json(typ frameType, part uint32, v any) *raw {
	b, _ := json.Marshal(v)
	return r.frame(typ, part, b)
}

func (r *raw) manifest(m Manifest) *raw {
	b, _ := json.Marshal(m)
	sum := sha256.Sum256(b)
	return r.frame(frameManifest, 0, b).frame(frameEnd, 0, sum[:])
}

func (r *raw) data(part uint32, off uint64, b string) *raw {
	return r.frame(frameData, part, append(binary.LittleEndian.AppendUint64(nil, off), b...))
}

func (r *raw) pages(part uint32, addr uint64, count, round, flags uint32, b []byte) *raw {
	p := binary.LittleEndian.AppendUint64(nil, addr)
	for _, v := range []uint32{count, round, flags, 0} {
		p = binary.LittleEndian.AppendUint32(p, v)
	}
	return r.frame(framePages, part, append(p, b...))
}

func TestHostile(t *testing.T) {
	entry := func(kind Part, e Entry) *raw {
		return newRaw().json(frameBegin, 0, kind).json(frameEntry, 0, e)
	}
	huge := newRaw()
	huge.Write([]byte{byte(frameData), 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	flags := newRaw()
	flags.Write([]byte{byte(frameClose), 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	version := &raw{}
	version.WriteString(magic)
	version.u32(99)
	version.u32(1)
	version.WriteString("x")
	withManifest := func(m Manifest) *raw { return newRaw().manifest(m) }
	plain := *manifest()
	plain.Version, plain.Session = Version, testSession
	change := func(f func(*Manifest)) *raw {
		m := plain
		m.Containers = slices.Clone(plain.Containers)
		f(&m)
		return withManifest(m)
	}
	for _, tc := range []struct {
		name string
		in   *raw
		want error
	}{
		{"no magic", func() *raw { r := &raw{}; r.WriteString(strings.Repeat("x", 64)); return r }(), ErrFormat},
		{"a version of the future", version, ErrVersion},
		{"a frame of four gigabytes", huge, ErrFormat},
		{"unknown flags", flags, ErrFormat},
		{"an unknown frame type", newRaw().frame(99, 0, nil), ErrFormat},
		{"an unknown kind of part", newRaw().json(frameBegin, 0, Part{Kind: "device"}), ErrFormat},
		{"an unknown field", newRaw().frame(frameBegin, 0, []byte(`{"kind":"shm","x":1}`)), ErrFormat},
		{"a part with a path for a name", newRaw().json(frameBegin, 0, Part{Kind: KindImage, Container: "a", Name: "../x"}), ErrFormat},
		{"a container with a path for a name", newRaw().json(frameBegin, 0, Part{Kind: KindImage, Container: "..", Name: "x"}), ErrFormat},
		{"a part without the name it needs", newRaw().json(frameBegin, 0, Part{Kind: KindVolume}), ErrFormat},
		{"a part twice", newRaw().json(frameBegin, 0, imagePart).json(frameBegin, 1, imagePart), ErrFormat},
		{"a part number twice", newRaw().json(frameBegin, 0, imagePart).json(frameBegin, 0, pagesPart), ErrFormat},
		{"data of no part", newRaw().data(7, 0, "x"), ErrFormat},
		{"data of a closed part", newRaw().json(frameBegin, 0, imagePart).frame(frameClose, 0, nil).data(0, 0, "x"), ErrFormat},
		{"data in pages", newRaw().json(frameBegin, 0, pagesPart).data(0, 0, "x"), ErrFormat},
		{"data without a file", newRaw().json(frameBegin, 0, rootPart).data(0, 0, "x"), ErrFormat},
		{"data behind the end of a file", entry(rootPart, Entry{Path: "f", Type: TypeFile, Size: 3}).data(0, 1, "abc"), ErrFormat},
		{"data at an offset that overflows", entry(rootPart, Entry{Path: "f", Type: TypeFile, Size: 3}).data(0, 1<<63, "abc"), ErrFormat},
		{"data in a directory", entry(rootPart, Entry{Path: "d", Type: TypeDir}).data(0, 0, "x"), ErrFormat},
		{"pages in an image", newRaw().json(frameBegin, 0, imagePart).pages(0, 0, 1, 0, 0, page(1)), ErrFormat},
		{"half a page", newRaw().json(frameBegin, 0, pagesPart).pages(0, 0, 1, 0, 0, page(1)[1:]), ErrFormat},
		{"no pages", newRaw().json(frameBegin, 0, pagesPart).pages(0, 0, 0, 0, 0, nil), ErrFormat},
		{"pages at an odd address", newRaw().json(frameBegin, 0, pagesPart).pages(0, 1, 1, 0, 0, page(1)), ErrFormat},
		{"pages behind the address space", newRaw().json(frameBegin, 0, pagesPart).pages(0, lastPage-PageSize, 2, 0, pagesZero, nil), ErrFormat},
		{"pages of a later round", newRaw().json(frameBegin, 0, pagesPart).pages(0, 0, 1, 1, 0, page(1)), ErrFormat},
		{"pages with unknown flags", newRaw().json(frameBegin, 0, pagesPart).pages(0, 0, 1, 0, 8, page(1)), ErrFormat},
		{"rounds out of order", newRaw().json(frameRound, 0, Round{Number: 1}), ErrFormat},
		{"a round after the final one", newRaw().json(frameRound, 0, Round{Final: true}).json(frameRound, 0, Round{Number: 1}), ErrFormat},
		{"an entry in an image", entry(imagePart, Entry{Path: "f", Type: TypeFile}), ErrFormat},
		{"an absolute path", entry(rootPart, Entry{Path: "/etc/passwd", Type: TypeFile}), ErrFormat},
		{"a path that climbs", entry(rootPart, Entry{Path: "a/../../x", Type: TypeFile}), ErrFormat},
		{"a path that is not clean", entry(rootPart, Entry{Path: "a//b", Type: TypeFile}), ErrFormat},
		{"a hard link that climbs", entry(rootPart, Entry{Path: "f", Type: TypeHardlink, Link: "../../etc/shadow"}), ErrFormat},
		{"an absolute hard link", entry(rootPart, Entry{Path: "f", Type: TypeHardlink, Link: "/etc/shadow"}), ErrFormat},
		{"a root that is a link", entry(rootPart, Entry{Path: ".", Type: TypeSymlink, Link: "/"}), ErrFormat},
		{"a device", entry(rootPart, Entry{Path: "sda", Type: "block"}), ErrFormat},
		{"a whiteout in a volume", entry(dataPart, Entry{Path: "f", Type: TypeWhiteout}), ErrFormat},
		{"a mode with a file type", entry(rootPart, Entry{Path: "f", Type: TypeFile, Mode: 0o100644}), ErrFormat},
		{"a negative size", entry(rootPart, Entry{Path: "f", Type: TypeFile, Size: -1}), ErrFormat},
		{"an attribute of the overlay", entry(rootPart, Entry{Path: "f", Type: TypeFile, Xattrs: map[string][]byte{"trusted.overlay.redirect": []byte("/")}}), ErrFormat},
		{"an opaque directory in a volume", entry(dataPart, Entry{Path: "d", Type: TypeDir, Xattrs: map[string][]byte{OverlayOpaque: []byte("y")}}), ErrFormat},
		{"a security label", entry(rootPart, Entry{Path: "f", Type: TypeFile, Xattrs: map[string][]byte{"security.selinux": []byte("x")}}), ErrFormat},
		{"a manifest before the parts end", newRaw().json(frameBegin, 0, imagePart).manifest(plain), ErrFormat},
		{"a manifest of another session", change(func(m *Manifest) { m.Session = "x" }), ErrFormat},
		{"a manifest of another version", change(func(m *Manifest) { m.Version = 2 }), ErrVersion},
		{"a manifest without containers", change(func(m *Manifest) { m.Containers = nil }), ErrFormat},
		{"a container twice", change(func(m *Manifest) { m.Containers = append(m.Containers, m.Containers[0]) }), ErrFormat},
		{"a manifest that is not the end", newRaw().json(frameManifest, 0, plain).json(frameRound, 0, Round{}), ErrFormat},
		{"a manifest of another digest", newRaw().json(frameManifest, 0, plain).frame(frameEnd, 0, make([]byte, 32)), ErrDigest},
		{"a part that never came", change(func(m *Manifest) { m.Parts = []Digest{{Part: imagePart}} }), ErrDigest},
		{"a part that is not in the manifest", newRaw().json(frameBegin, 0, imagePart).frame(frameClose, 0, nil).manifest(plain), ErrDigest},
		{"rounds that never came", change(func(m *Manifest) { m.Rounds = []Round{{Final: true}} }), ErrDigest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Read(&tc.in.Buffer, testSession, newSink(), Limits{})
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
}

func TestLimit(t *testing.T) {
	_, err := Read(bytes.NewReader(stream(t)), testSession, newSink(), Limits{Bytes: 100})
	if !errors.Is(err, ErrFormat) {
		t.Errorf("error %v", err)
	}
}

func TestSinkRefuses(t *testing.T) {
	want := errors.New("not expected")
	sink := newSink()
	sink.refuse = func(p Part) error {
		if p == rootPart {
			return want
		}
		return nil
	}
	if _, err := Read(bytes.NewReader(stream(t)), testSession, sink, Limits{}); !errors.Is(err, want) {
		t.Errorf("error %v", err)
	}
}

// TestBrokenWriter: after an error of the connection every call fails with it.
func TestBrokenWriter(t *testing.T) {
	r, out := io.Pipe()
	go func() {
		_, _ = io.CopyN(io.Discard, r, 100)
		r.Close()
	}()
	w, err := NewWriter(out, testSession)
	check(t, err)
	var first error
	for range 10 {
		p, err := w.Begin(Part{Kind: KindImage, Container: "a", Name: fmt.Sprint(w.next)})
		if err == nil {
			err = p.Data(0, make([]byte, 1000))
		}
		if first != nil && err == nil {
			t.Fatal("a call succeeded after the connection broke")
		}
		if err != nil {
			first = err
		}
	}
	if first == nil {
		t.Error("no error")
	}
}

// FuzzRead: no input may crash the reader, and what it accepts must verify again.
func FuzzRead(f *testing.F) {
	f.Add(stream(f))
	f.Add(newRaw().json(frameBegin, 0, rootPart).json(frameEntry, 0, Entry{Path: "f", Type: TypeFile, Size: 3}).data(0, 0, "abc").Bytes())
	f.Add(newRaw().json(frameBegin, 0, pagesPart).pages(0, 0, 1, 0, 0, page(1)).Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		res, err := Read(bytes.NewReader(b), testSession, newSink(), Limits{Bytes: 1 << 24})
		if err == nil && (res.Manifest == nil || res.Bytes > uint64(len(b))) {
			t.Errorf("result %+v", res)
		}
	})
}
