package checkpoint

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/cespare/xxhash/v2"
)

// Version is the version of the stream that this package writes and reads.
const Version = 1

// PageSize is the unit of memory in the stream. Processes of machines with
// larger base pages cannot be moved with version 1.
const PageSize = 4096

// MaxData is the most data bytes one frame carries.
const MaxData = 1 << 20

const (
	magic        = "PODMIG\r\n"
	maxSession   = 256
	frameHeader  = 12
	dataHeader   = 8
	pagesHeader  = 24
	maxPayload   = pagesHeader + MaxData
	maxJSON      = 256 << 10
	maxManifest  = 8 << 20
	maxPartCount = 1 << 20
)

type frameType uint8

const (
	frameBegin    frameType = 1 // JSON Part: announces a part
	frameEntry    frameType = 2 // JSON Entry: the next file of a tree
	frameData     frameType = 3 // offset, bytes of an image, a log or the current entry
	framePages    frameType = 4 // address, count, round, flags, pages
	frameClose    frameType = 5 // the part is complete
	frameRound    frameType = 6 // JSON Round: a round of memory is complete
	frameManifest frameType = 7 // JSON Manifest, after all parts
	frameEnd      frameType = 8 // SHA-256 of the manifest, always last
)

// pagesZero marks a run of pages that are zero and therefore not sent.
const pagesZero = 1

// Kind says what a part is.
type Kind string

const (
	// KindImage is one file of a CRIU image set.
	KindImage Kind = "image"
	// KindPages is the private memory of one process.
	KindPages Kind = "pages"
	// KindRootfs is the writable layer of a container, in overlay form.
	KindRootfs Kind = "rootfs"
	// KindVolume is the content of a volume of the pod.
	KindVolume Kind = "volume"
	// KindShm is the content of the pod's /dev/shm.
	KindShm Kind = "shm"
	// KindLog is the current log file of a container.
	KindLog Kind = "log"
)

// Part is what a part announces of itself. Kind, container and name together
// are unique in a stream.
type Part struct {
	Kind Kind `json:"kind"`
	// Container is the name of the container in the pod; empty for parts that
	// belong to the pod.
	Container string `json:"container,omitempty"`
	// Name is the file name of an image, the number of a process in the container or
	// the name of a volume.
	Name string `json:"name,omitempty"`
}

func (p Part) String() string {
	s := string(p.Kind)
	if p.Container != "" {
		s += " of container " + p.Container
	}
	if p.Name != "" {
		s += " " + p.Name
	}
	return s
}

// tree tells whether the part consists of entries.
func (p Part) tree() bool {
	return p.Kind == KindRootfs || p.Kind == KindVolume || p.Kind == KindShm
}

func (p Part) check() error {
	if p.Container != "" && !validName(p.Container) {
		return fmt.Errorf("container name %q is not a plain name", p.Container)
	}
	if p.Name != "" && !validName(p.Name) {
		return fmt.Errorf("part name %q is not a plain file name", p.Name)
	}
	var container, name bool
	switch p.Kind {
	case KindImage, KindPages:
		container, name = true, true
	case KindRootfs, KindLog:
		container = true
	case KindVolume:
		name = true
	case KindShm:
	default:
		return fmt.Errorf("unknown kind of part %q", p.Kind)
	}
	if (p.Container != "") != container || (p.Name != "") != name {
		return fmt.Errorf("part of kind %s has container %q and name %q, which is more or less than it needs", p.Kind, p.Container, p.Name)
	}
	return nil
}

// validName accepts what may become one path element without any surprise.
func validName(s string) bool {
	if s == "" || s == "." || s == ".." || len(s) > 255 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if s[i] == '/' || s[i] < 0x20 || s[i] == 0x7f {
			return false
		}
	}
	return true
}

// Round reports one round of memory that was sent while the containers ran, or
// the final one, read from the frozen containers.
type Round struct {
	Number uint32 `json:"number"`
	Final  bool   `json:"final,omitempty"`
	// Ready says that nothing more is sent before the freeze: what is left is little,
	// or does not shrink any more. It is set once, in the last round before the final one.
	Ready bool `json:"ready,omitempty"`
	// Pages is the number of pages the round sent, zero pages included.
	Pages uint64 `json:"pages"`
}

type frame struct {
	typ  frameType
	part uint32
	size uint32
}

func (f frame) put(b []byte) {
	b[0], b[1], b[2], b[3] = byte(f.typ), 0, 0, 0
	binary.LittleEndian.PutUint32(b[4:], f.part)
	binary.LittleEndian.PutUint32(b[8:], f.size)
}

func parseFrame(b []byte) (frame, error) {
	f := frame{
		typ:  frameType(b[0]),
		part: binary.LittleEndian.Uint32(b[4:]),
		size: binary.LittleEndian.Uint32(b[8:]),
	}
	if b[1] != 0 || b[2] != 0 || b[3] != 0 {
		return f, fmt.Errorf("%w: frame header carries unknown flags", ErrFormat)
	}
	limit := uint32(maxJSON)
	switch f.typ {
	case frameBegin, frameEntry, frameRound:
	case frameData, framePages:
		limit = maxPayload
	case frameClose:
		limit = 0
	case frameManifest:
		limit = maxManifest
	case frameEnd:
		limit = sha256.Size
	default:
		return f, fmt.Errorf("%w: unknown frame type %d", ErrFormat, f.typ)
	}
	if f.size > limit {
		return f, fmt.Errorf("%w: frame of type %d claims %d bytes, at most %d are allowed", ErrFormat, f.typ, f.size, limit)
	}
	return f, nil
}

// hashFrame adds a frame to the SHA-256 of its part. Of pages it adds a 64-bit sum
// instead of the bytes: they are the bulk of what is read while a pod is frozen,
// SHA-256 over them would take longer than reading and sending them, and nobody in
// between could profit from it, because the nodes are joined by an authenticated
// connection and the manifest comes from the same hand as the pages. The sum finds
// what can still go wrong: pages that were mixed up, lost or damaged in memory.
func hashFrame(h hash.Hash, kind Kind, head, body []byte) {
	h.Write(head)
	if kind != KindPages {
		h.Write(body)
		return
	}
	var sum [8]byte
	binary.LittleEndian.PutUint64(sum[:], xxhash.Sum64(body))
	h.Write(sum[:])
}
