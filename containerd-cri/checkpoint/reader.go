package checkpoint

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"slices"
)

// Sink takes the parts of a stream. It is called by one goroutine.
type Sink interface {
	// Begin is called when a part is announced. An error ends the reading: a sink
	// refuses parts that it did not expect.
	Begin(Part) (PartSink, error)
	// Round is called when a round is complete.
	Round(Round) error
}

// PartSink takes one part. The slices are valid during the call only.
type PartSink interface {
	// Entry begins the next file of a tree. It is only called for trees.
	Entry(*Entry) error
	// Data is content of an image, a log, or the latest entry, whose size it
	// never exceeds.
	Data(off int64, b []byte) error
	// Pages are whole pages; b is nil when all of them are zero. It is only called
	// for parts of kind pages.
	Pages(round uint32, addr uint64, count uint32, b []byte) error
	// Close ends the part. Its digest is not known to be right before Read returns.
	Close() error
}

// Limits bound what a stream may ask of its reader.
type Limits struct {
	// Bytes of data in all parts together; 0 means no limit.
	Bytes uint64
}

// Result is what a stream turned out to be.
type Result struct {
	Manifest *Manifest
	// Digest is the SHA-256 of the manifest, hexadecimal.
	Digest string
	// Bytes is the length of the stream.
	Bytes uint64
}

type openPart struct {
	part  Part
	sink  PartSink
	hash  hash.Hash
	bytes uint64
	// size is the size of the current entry, -1 when data may not follow.
	size  int64
	round uint32
}

type reader struct {
	in     *bufio.Reader
	n      uint64
	sink   Sink
	limits Limits
	open   map[uint32]*openPart
	next   uint32
	total  uint64
	seen   map[Part]bool
	done   []Digest
	rounds []Round
	buf    []byte
}

// Read reads a stream to its end and hands its parts to the sink. It returns only
// after the manifest matched everything that was read, and reads nothing behind it.
// Wrapped errors: ErrVersion, ErrFormat, ErrDigest, io.ErrUnexpectedEOF for a
// stream that was cut off, and whatever the sink returned.
func Read(in io.Reader, session string, sink Sink, limits Limits) (Result, error) {
	r := &reader{
		in:     bufio.NewReaderSize(in, 64<<10),
		sink:   sink,
		limits: limits,
		open:   map[uint32]*openPart{},
		seen:   map[Part]bool{},
		buf:    make([]byte, maxPayload),
	}
	res, err := r.run(session)
	res.Bytes = r.n
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return res, fmt.Errorf("checkpoint stream: %w", err)
	}
	return res, nil
}

func (r *reader) full(b []byte) error {
	n, err := io.ReadFull(r.in, b)
	r.n += uint64(n)
	return err
}

func (r *reader) header(session string) error {
	b := r.buf[:len(magic)+8]
	if err := r.full(b); err != nil {
		return err
	}
	if string(b[:len(magic)]) != magic {
		return fmt.Errorf("%w: it does not begin with the magic bytes", ErrFormat)
	}
	if v := binary.LittleEndian.Uint32(b[len(magic):]); v != Version {
		return fmt.Errorf("%w: the other side writes %d, this side reads %d", ErrVersion, v, Version)
	}
	n := binary.LittleEndian.Uint32(b[len(magic)+4:])
	if n == 0 || n > maxSession {
		return fmt.Errorf("%w: session name of %d bytes", ErrFormat, n)
	}
	if err := r.full(r.buf[:n]); err != nil {
		return err
	}
	if string(r.buf[:n]) != session {
		return fmt.Errorf("%w: it belongs to session %q, not to %q", ErrFormat, r.buf[:n], session)
	}
	return nil
}

func (r *reader) run(session string) (Result, error) {
	if err := r.header(session); err != nil {
		return Result{}, err
	}
	var head [frameHeader]byte
	for {
		if err := r.full(head[:]); err != nil {
			return Result{}, err
		}
		f, err := parseFrame(head[:])
		if err != nil {
			return Result{}, err
		}
		if f.typ == frameManifest {
			return r.manifest(f, session)
		}
		b := r.buf[:f.size]
		if err := r.full(b); err != nil {
			return Result{}, err
		}
		if err := r.frame(f, b); err != nil {
			return Result{}, err
		}
	}
}

func (r *reader) frame(f frame, b []byte) error {
	switch f.typ {
	case frameBegin:
		return r.begin(f.part, b)
	case frameRound:
		var round Round
		if err := decodeCanonical(b, &round); err != nil {
			return err
		}
		if f.part != 0 || round.Number != uint32(len(r.rounds)) || (len(r.rounds) > 0 && r.rounds[len(r.rounds)-1].Final) {
			return fmt.Errorf("%w: round %d out of order", ErrFormat, round.Number)
		}
		if round.Ready && round.Final || len(r.rounds) > 0 && r.rounds[len(r.rounds)-1].Ready && !round.Final {
			return fmt.Errorf("%w: round %d after the source was ready for its freeze", ErrFormat, round.Number)
		}
		if len(r.rounds) >= 1024 {
			return fmt.Errorf("%w: more than 1024 rounds", ErrFormat)
		}
		r.rounds = append(r.rounds, round)
		return r.sink.Round(round)
	}
	p := r.open[f.part]
	if p == nil {
		return fmt.Errorf("%w: frame of part %d, which is not open", ErrFormat, f.part)
	}
	var err error
	switch f.typ {
	case frameEntry:
		err = r.entry(p, b)
	case frameData:
		err = r.data(p, b)
	case framePages:
		err = r.pages(p, b)
	case frameClose:
		delete(r.open, f.part)
		r.done = append(r.done, Digest{Part: p.part, Bytes: p.bytes, SHA256: hex.EncodeToString(p.hash.Sum(nil))})
		err = p.sink.Close()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.part, err)
	}
	return nil
}

func (r *reader) begin(id uint32, b []byte) error {
	var part Part
	if err := decodeCanonical(b, &part); err != nil {
		return err
	}
	if err := part.check(); err != nil {
		return fmt.Errorf("%w: %v", ErrFormat, err)
	}
	// Ascending IDs make a repeated ID impossible without remembering them.
	if id < r.next || id >= maxPartCount {
		return fmt.Errorf("%w: part %s has number %d out of order", ErrFormat, part, id)
	}
	r.next = id + 1
	if r.seen[part] {
		return fmt.Errorf("%w: part %s comes twice", ErrFormat, part)
	}
	r.seen[part] = true
	sink, err := r.sink.Begin(part)
	if err != nil {
		return fmt.Errorf("%s: %w", part, err)
	}
	size := int64(-1)
	if part.Kind == KindImage || part.Kind == KindLog {
		size = 1 << 50
	}
	r.open[id] = &openPart{part: part, sink: sink, hash: sha256.New(), size: size}
	return nil
}

func (r *reader) count(n int) error {
	r.total += uint64(n)
	if r.limits.Bytes != 0 && r.total > r.limits.Bytes {
		return fmt.Errorf("%w: more than %d bytes of data", ErrFormat, r.limits.Bytes)
	}
	return nil
}

func (r *reader) entry(p *openPart, b []byte) error {
	if !p.part.tree() {
		return fmt.Errorf("%w: an entry outside a tree", ErrFormat)
	}
	var e Entry
	if err := decodeStrict(b, &e); err != nil {
		return err
	}
	if err := e.check(p.part.Kind); err != nil {
		return err
	}
	p.hash.Write(b)
	p.size = -1
	if e.Type == TypeFile {
		p.size = e.Size
	}
	return p.sink.Entry(&e)
}

func (r *reader) data(p *openPart, b []byte) error {
	if p.part.Kind == KindPages {
		return fmt.Errorf("%w: file data in a part of pages", ErrFormat)
	}
	if len(b) < dataHeader || len(b) > dataHeader+MaxData {
		return fmt.Errorf("%w: data frame of %d bytes", ErrFormat, len(b))
	}
	off := binary.LittleEndian.Uint64(b)
	n := uint64(len(b) - dataHeader)
	if p.size < 0 || off > uint64(p.size) || n > uint64(p.size)-off {
		return fmt.Errorf("%w: %d bytes at offset %d lie outside the file", ErrFormat, n, off)
	}
	if err := r.count(int(n)); err != nil {
		return err
	}
	hashFrame(p.hash, p.part.Kind, b[:dataHeader], b[dataHeader:])
	p.bytes += n
	return p.sink.Data(int64(off), b[dataHeader:])
}

// lastPage is the end of the address space of any supported machine.
const lastPage = uint64(1) << 57

func (r *reader) pages(p *openPart, b []byte) error {
	if p.part.Kind != KindPages {
		return fmt.Errorf("%w: pages in a part that has none", ErrFormat)
	}
	if len(b) < pagesHeader {
		return fmt.Errorf("%w: pages frame of %d bytes", ErrFormat, len(b))
	}
	addr := binary.LittleEndian.Uint64(b)
	count := binary.LittleEndian.Uint32(b[8:])
	round := binary.LittleEndian.Uint32(b[12:])
	flags := binary.LittleEndian.Uint32(b[16:])
	rest := binary.LittleEndian.Uint32(b[20:])
	data := b[pagesHeader:]
	want := uint64(count) * PageSize
	if flags&pagesZero != 0 {
		want = 0
	}
	switch {
	case flags&^pagesZero != 0 || rest != 0:
		return fmt.Errorf("%w: pages with unknown flags", ErrFormat)
	case count == 0 || addr%PageSize != 0 || addr >= lastPage || uint64(count)*PageSize > lastPage-addr:
		return fmt.Errorf("%w: %d pages at %#x are no memory of a process", ErrFormat, count, addr)
	case uint64(len(data)) != want:
		return fmt.Errorf("%w: %d pages in %d bytes", ErrFormat, count, len(data))
	case round != uint32(len(r.rounds)):
		return fmt.Errorf("%w: pages of round %d in round %d", ErrFormat, round, len(r.rounds))
	}
	if err := r.count(len(data)); err != nil {
		return err
	}
	hashFrame(p.hash, p.part.Kind, b[:pagesHeader], data)
	p.bytes += uint64(len(data))
	if want == 0 {
		data = nil
	}
	return p.sink.Pages(round, addr, count, data)
}

func (r *reader) manifest(f frame, session string) (Result, error) {
	if f.part != 0 || len(r.open) != 0 {
		return Result{}, fmt.Errorf("%w: the manifest comes before the end of %d parts", ErrFormat, len(r.open))
	}
	b := make([]byte, f.size)
	if err := r.full(b); err != nil {
		return Result{}, err
	}
	sum := sha256.Sum256(b)
	if err := r.end(sum); err != nil {
		return Result{}, err
	}
	m := new(Manifest)
	if err := decodeStrict(b, m); err != nil {
		return Result{}, err
	}
	if err := m.check(session); err != nil {
		return Result{}, err
	}
	if !slices.Equal(m.Rounds, r.rounds) {
		return Result{}, fmt.Errorf("%w: the rounds of the manifest are not those of the stream", ErrDigest)
	}
	if err := r.compare(m); err != nil {
		return Result{}, err
	}
	return Result{Manifest: m, Digest: hex.EncodeToString(sum[:])}, nil
}

// end reads the last frame: without it a changed time or version in the manifest
// would go unnoticed.
func (r *reader) end(sum [sha256.Size]byte) error {
	var head [frameHeader]byte
	if err := r.full(head[:]); err != nil {
		return err
	}
	f, err := parseFrame(head[:])
	if err != nil {
		return err
	}
	var want [sha256.Size]byte
	if f.typ != frameEnd || f.part != 0 || f.size != sha256.Size {
		return fmt.Errorf("%w: the manifest is not the end", ErrFormat)
	}
	if err := r.full(want[:]); err != nil {
		return err
	}
	if want != sum {
		return fmt.Errorf("%w: the manifest has another digest", ErrDigest)
	}
	return nil
}

func (r *reader) compare(m *Manifest) error {
	got := map[Part]Digest{}
	for _, d := range r.done {
		got[d.Part] = d
	}
	for _, want := range m.Parts {
		d, ok := got[want.Part]
		if !ok {
			return fmt.Errorf("%w: %s is in the manifest but not in the stream, or twice in the manifest", ErrDigest, want.Part)
		}
		if d != want {
			return fmt.Errorf("%w: %s has digest %s over %d bytes, the manifest says %s over %d", ErrDigest, want.Part, d.SHA256, d.Bytes, want.SHA256, want.Bytes)
		}
		delete(got, want.Part)
	}
	for part := range maps.Keys(got) {
		return fmt.Errorf("%w: %s is in the stream but not in the manifest", ErrDigest, part)
	}
	for _, d := range m.Parts {
		if d.Container != "" && m.Container(d.Container) == nil {
			return fmt.Errorf("%w: %s belongs to a container that the manifest does not name", ErrDigest, d.Part)
		}
	}
	return nil
}
