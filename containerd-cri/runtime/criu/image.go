package criu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// Magic numbers of image files: the first says that the file is an image of the
// second kind, the third does the same for images about the whole set.
const (
	magicCommon  = 0x54564319
	magicService = 0x55105940

	magicPagemap = 0x56084025
)

// maxEntry bounds one entry of an image. CRIU's own are far below.
const maxEntry = 16 << 20

// ErrImage is wrapped by errors about files that are no valid images.
var ErrImage = errors.New("invalid CRIU image")

type imageReader struct {
	in  *bufio.Reader
	buf []byte
}

// newImageReader checks the magic number of an image; 0 accepts every kind.
func newImageReader(r io.Reader, magic uint32) (*imageReader, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	var b [4]byte
	if _, err := io.ReadFull(in, b[:]); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrImage, err)
	}
	kind := binary.LittleEndian.Uint32(b[:])
	if kind == magicCommon || kind == magicService {
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return nil, fmt.Errorf("%w: %v", ErrImage, err)
		}
		kind = binary.LittleEndian.Uint32(b[:])
	}
	if magic != 0 && kind != magic {
		return nil, fmt.Errorf("%w: magic number %#x instead of %#x", ErrImage, kind, magic)
	}
	return &imageReader{in: in}, nil
}

// next reads the next entry; io.EOF means the end.
func (r *imageReader) next(m proto.Message) error {
	var b [4]byte
	if _, err := io.ReadFull(r.in, b[:]); errors.Is(err, io.EOF) {
		return io.EOF
	} else if err != nil {
		return fmt.Errorf("%w: %v", ErrImage, err)
	}
	n := binary.LittleEndian.Uint32(b[:])
	if n > maxEntry {
		return fmt.Errorf("%w: an entry of %d bytes", ErrImage, n)
	}
	if uint32(cap(r.buf)) < n {
		r.buf = make([]byte, n)
	}
	r.buf = r.buf[:n]
	if _, err := io.ReadFull(r.in, r.buf); err != nil {
		return fmt.Errorf("%w: %v", ErrImage, err)
	}
	if err := proto.Unmarshal(r.buf, m); err != nil {
		return fmt.Errorf("%w: %v", ErrImage, err)
	}
	return nil
}

type imageWriter struct {
	out *bufio.Writer
	buf []byte
}

func newImageWriter(w io.Writer, magic uint32) *imageWriter {
	out := &imageWriter{out: bufio.NewWriterSize(w, 64<<10)}
	out.buf = binary.LittleEndian.AppendUint32(out.buf, magicCommon)
	out.buf = binary.LittleEndian.AppendUint32(out.buf, magic)
	_, _ = out.out.Write(out.buf) // Its error stays until the flush.
	return out
}

func (w *imageWriter) write(m proto.Message) error {
	b, err := proto.MarshalOptions{}.MarshalAppend(append(w.buf[:0], 0, 0, 0, 0), m)
	if err != nil {
		return err
	}
	w.buf = b
	binary.LittleEndian.PutUint32(b, uint32(len(b)-4))
	_, err = w.out.Write(b)
	return err
}

func (w *imageWriter) flush() error { return w.out.Flush() }
