package checkpoint

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"sync"
)

// Writer writes a stream. Its methods and those of its parts may be called from
// several goroutines, one per part; frames do not mix. After an error of the
// underlying writer every call returns that error.
type Writer struct {
	session string

	mu    sync.Mutex
	w     io.Writer
	n     uint64
	err   error
	parts map[Part]bool
	next  uint32
	open  int
	done  []Digest
	round []Round
	head  [frameHeader + pagesHeader]byte
}

// NewWriter starts a stream.
func NewWriter(w io.Writer, session string) (*Writer, error) {
	if session == "" || len(session) > maxSession {
		return nil, fmt.Errorf("session name of %d bytes: 1 to %d are possible", len(session), maxSession)
	}
	b := make([]byte, 0, len(magic)+8+len(session))
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, Version)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(session)))
	b = append(b, session...)
	out := &Writer{session: session, w: w, parts: map[Part]bool{}}
	n, err := w.Write(b)
	out.n = uint64(n)
	if err != nil {
		return nil, fmt.Errorf("checkpoint stream: %w", err)
	}
	return out, nil
}

// Bytes returns the number of bytes written so far.
func (w *Writer) Bytes() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n
}

// frame writes one frame: head is the fixed part of the payload, body the rest.
func (w *Writer) frame(typ frameType, part uint32, head, body []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.frameLocked(typ, part, head, body)
}

func (w *Writer) frameLocked(typ frameType, part uint32, head, body []byte) error {
	if w.err != nil {
		return w.err
	}
	frame{typ: typ, part: part, size: uint32(len(head) + len(body))}.put(w.head[:])
	n := frameHeader + copy(w.head[frameHeader:], head)
	// One writev for header and data: no copy of the data, no second system call.
	bufs := net.Buffers{w.head[:n], body}
	m, err := bufs.WriteTo(w.w)
	w.n += uint64(m)
	if err != nil {
		w.err = fmt.Errorf("checkpoint stream: %w", err)
	}
	return w.err
}

func (w *Writer) json(typ frameType, part uint32, v any, limit int) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if len(b) > limit {
		return nil, fmt.Errorf("%T of %d bytes does not fit the checkpoint stream, which takes %d", v, len(b), limit)
	}
	return b, w.frame(typ, part, nil, b)
}

// Begin announces a part.
func (w *Writer) Begin(p Part) (*PartWriter, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	// Numbers ascend in the stream, so giving one and writing it are one step.
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.parts[p] {
		return nil, fmt.Errorf("checkpoint stream: part %s begun twice", p)
	}
	w.parts[p] = true
	id := w.next
	w.next++
	w.open++
	if err := w.frameLocked(frameBegin, id, nil, b); err != nil {
		return nil, err
	}
	return &PartWriter{w: w, id: id, part: p, hash: sha256.New()}, nil
}

// Round marks the end of a round. Parts of kind pages may be left open over rounds.
func (w *Writer) Round(r Round) error {
	w.mu.Lock()
	w.round = append(w.round, r)
	w.mu.Unlock()
	_, err := w.json(frameRound, 0, r, maxJSON)
	return err
}

// Finish completes the manifest with what the writer knows, writes it and returns
// its digest. All parts must have been closed.
func (w *Writer) Finish(m *Manifest) (digest string, err error) {
	w.mu.Lock()
	if w.open != 0 {
		w.mu.Unlock()
		return "", errors.New("checkpoint stream: finished with open parts")
	}
	m.Version, m.Session, m.Parts, m.Rounds = Version, w.session, w.done, w.round
	w.mu.Unlock()
	if err := m.check(w.session); err != nil {
		return "", err
	}
	b, err := w.json(frameManifest, 0, m, maxManifest)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), w.frame(frameEnd, 0, nil, sum[:])
}

// PartWriter writes one part.
type PartWriter struct {
	w     *Writer
	id    uint32
	part  Part
	hash  hash.Hash
	bytes uint64
	head  [pagesHeader]byte
}

// Entry begins the next file of a tree.
func (p *PartWriter) Entry(e *Entry) error {
	if err := e.check(p.part.Kind); err != nil {
		return err
	}
	b, err := p.w.json(frameEntry, p.id, e, maxJSON)
	p.hash.Write(b)
	return err
}

// Data writes bytes at an offset of an image, a log or the current entry.
func (p *PartWriter) Data(off int64, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), MaxData)
		binary.LittleEndian.PutUint64(p.head[:], uint64(off))
		if err := p.payload(frameData, p.head[:dataHeader], b[:n]); err != nil {
			return err
		}
		off, b = off+int64(n), b[n:]
	}
	return nil
}

// Pages writes whole pages that begin at an address.
func (p *PartWriter) Pages(round uint32, addr uint64, b []byte) error {
	if addr%PageSize != 0 || len(b)%PageSize != 0 {
		return fmt.Errorf("checkpoint stream: %d bytes at %#x are not whole pages", len(b), addr)
	}
	for len(b) > 0 {
		n := min(len(b), MaxData)
		p.pagesHead(round, addr, uint32(n/PageSize), 0)
		if err := p.payload(framePages, p.head[:pagesHeader], b[:n]); err != nil {
			return err
		}
		addr, b = addr+uint64(n), b[n:]
	}
	return nil
}

// ZeroPages says that pages are zero.
func (p *PartWriter) ZeroPages(round uint32, addr uint64, count uint32) error {
	p.pagesHead(round, addr, count, pagesZero)
	return p.payload(framePages, p.head[:pagesHeader], nil)
}

func (p *PartWriter) pagesHead(round uint32, addr uint64, count, flags uint32) {
	binary.LittleEndian.PutUint64(p.head[0:], addr)
	binary.LittleEndian.PutUint32(p.head[8:], count)
	binary.LittleEndian.PutUint32(p.head[12:], round)
	binary.LittleEndian.PutUint32(p.head[16:], flags)
	binary.LittleEndian.PutUint32(p.head[20:], 0)
}

func (p *PartWriter) payload(typ frameType, head, body []byte) error {
	hashFrame(p.hash, p.part.Kind, head, body)
	p.bytes += uint64(len(body))
	return p.w.frame(typ, p.id, head, body)
}

// Close ends the part.
func (p *PartWriter) Close() error {
	if err := p.w.frame(frameClose, p.id, nil, nil); err != nil {
		return err
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	p.w.open--
	p.w.done = append(p.w.done, Digest{Part: p.part, Bytes: p.bytes, SHA256: hex.EncodeToString(p.hash.Sum(nil))})
	return nil
}
