package checkpoint

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// content is what an archive turned out to be.
type content struct {
	bytes      int64
	digest     string
	containers []string
}

// verify reads an archive to its end: a stream, whose parts match its manifest, then the
// same manifest, and nothing else.
func verify(in io.Reader) (content, error) {
	var c content
	sum := sha256.New()
	in = io.TeeReader(in, &counter{w: sum, n: &c.bytes})
	t := tar.NewReader(in)
	h, err := next(t, cri.PodStream)
	if err != nil {
		return c, err
	}
	res, err := checkpoint.Read(t, cri.PodSession, nothing{}, checkpoint.Limits{})
	if err != nil {
		return c, err
	}
	if uint64(h.Size) != res.Bytes {
		return c, fmt.Errorf("%s has %d bytes, its stream %d", cri.PodStream, h.Size, res.Bytes)
	}
	if h, err = next(t, cri.PodManifest); err != nil {
		return c, err
	}
	if h.Size > checkpoint.MaxManifest {
		return c, fmt.Errorf("%s has %d bytes", cri.PodManifest, h.Size)
	}
	manifest, err := io.ReadAll(t)
	if err != nil {
		return c, err
	}
	if d := sha256.Sum256(manifest); hex.EncodeToString(d[:]) != res.Digest {
		return c, fmt.Errorf("%s is not the manifest of the stream", cri.PodManifest)
	}
	if h, err := t.Next(); !errors.Is(err, io.EOF) {
		if err == nil {
			err = fmt.Errorf("there is %q behind the manifest", h.Name)
		}
		return c, err
	}
	if n, err := io.Copy(io.Discard, in); err != nil || n > 0 {
		return c, errors.Join(err, fmt.Errorf("%d bytes are behind the archive", n))
	}
	for _, x := range res.Manifest.Containers {
		c.containers = append(c.containers, x.Name)
	}
	c.digest = hex.EncodeToString(sum.Sum(nil))
	return c, nil
}

// next goes to the file that has to come.
func next(t *tar.Reader, name string) (*tar.Header, error) {
	h, err := t.Next()
	switch {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("there is no %s: %w", name, io.ErrUnexpectedEOF)
	case err != nil:
		return nil, err
	case h.Name != name || h.Typeflag != tar.TypeReg:
		return nil, fmt.Errorf("there is %q in the place of %s", h.Name, name)
	}
	return h, nil
}

type counter struct {
	w io.Writer
	n *int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	*c.n += int64(n)
	return n, err
}

// nothing takes the parts of a stream and keeps none.
type nothing struct{}

func (nothing) Begin(checkpoint.Part) (checkpoint.PartSink, error) { return nothing{}, nil }
func (nothing) Round(checkpoint.Round) error                       { return nil }
func (nothing) Entry(*checkpoint.Entry) error                      { return nil }
func (nothing) Data(int64, []byte) error                           { return nil }
func (nothing) Pages(uint32, uint64, uint32, []byte) error         { return nil }
func (nothing) Close() error                                       { return nil }
