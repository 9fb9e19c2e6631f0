package service

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/checkpoint/tree"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
)

// restoreSink puts the parts of a stream where the restore expects them: CRIU
// images and memory into the session's directory, files into the writable layers
// and volumes of the created containers. It takes only parts that the session has
// a place for.
type restoreSink struct {
	r    *restoreSession
	seen map[checkpoint.Part]bool
	open map[checkpoint.PartSink]func()
	// pages are the stores of memory by container.
	pages map[string][]*criu.Store
	// granted is how many bytes may come before free is asked again.
	granted int
	free    func() (uint64, error)
	// round is called after each round.
	round func(checkpoint.Round)
}

func newRestoreSink(r *restoreSession, free func() (uint64, error), round func(checkpoint.Round)) *restoreSink {
	return &restoreSink{r: r, seen: map[checkpoint.Part]bool{}, open: map[checkpoint.PartSink]func(){}, pages: map[string][]*criu.Store{}, free: free, round: round}
}

func (k *restoreSink) container(name string) *Container {
	for i := range k.r.Containers {
		if k.r.Containers[i].Name == name {
			return &k.r.Containers[i]
		}
	}
	return nil
}

// Begin implements checkpoint.Sink.
func (k *restoreSink) Begin(p checkpoint.Part) (checkpoint.PartSink, error) {
	sink, err := k.begin(p)
	if err != nil {
		return nil, err
	}
	k.seen[p] = true
	if p.Kind == checkpoint.KindImage || p.Kind == checkpoint.KindPages {
		return &inMemory{PartSink: sink, k: k}, nil
	}
	return sink, nil
}

// The node's free memory is looked at once per memoryStep bytes, and memoryReserve
// is left to others.
const (
	memoryStep    = 32 << 20
	memoryReserve = 128 << 20
)

// inMemory refuses a checkpoint before it drives the node out of memory: files in
// memory can not be given back by the kernel.
type inMemory struct {
	checkpoint.PartSink
	k *restoreSink
}

// Data implements checkpoint.PartSink.
func (m *inMemory) Data(off int64, b []byte) error {
	if err := m.k.take(len(b)); err != nil {
		return err
	}
	return m.PartSink.Data(off, b)
}

// Pages implements checkpoint.PartSink.
func (m *inMemory) Pages(round uint32, addr uint64, count uint32, b []byte) error {
	if err := m.k.take(len(b)); err != nil {
		return err
	}
	return m.PartSink.Pages(round, addr, count, b)
}

func (k *restoreSink) take(n int) error {
	k.granted -= n
	if k.granted >= 0 {
		return nil
	}
	free, err := k.free()
	if err != nil {
		return err
	}
	if free < memoryReserve+memoryStep {
		return fmt.Errorf("%d MiB of memory are left on this node, the checkpoint needs more: %w", free>>20, unix.ENOMEM)
	}
	k.granted = memoryStep
	return nil
}

// freeMemory returns what the kernel could give without swapping.
func freeMemory() (uint64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			n, err := strconv.ParseUint(strings.Fields(rest)[0], 10, 64)
			return n << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo does not tell the available memory")
}

func (k *restoreSink) begin(p checkpoint.Part) (checkpoint.PartSink, error) {
	var c *Container
	if p.Container != "" {
		if c = k.container(p.Container); c == nil {
			return nil, fmt.Errorf("%w: this session has no container %q", checkpoint.ErrFormat, p.Container)
		}
	}
	switch p.Kind {
	case checkpoint.KindImage:
		return k.file(filepath.Join(k.r.images(c.Name), p.Name), os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	case checkpoint.KindPages:
		if pid, err := strconv.ParseUint(p.Name, 10, 31); err != nil || criu.PagesName(int(pid)) != p.Name {
			return nil, fmt.Errorf("%w: pages of %q, which is no process", checkpoint.ErrFormat, p.Name)
		}
		st, err := criu.NewStore(k.r.images(c.Name), p.Name)
		if err != nil {
			return nil, err
		}
		k.open[st] = st.Abort
		k.pages[c.Name] = append(k.pages[c.Name], st)
		return st, nil
	case checkpoint.KindLog:
		if c.LogPath == "" {
			return discard{}, nil
		}
		return k.file(c.LogPath, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	case checkpoint.KindRootfs:
		return k.tree(c.UpperDir, p.Kind)
	case checkpoint.KindVolume:
		dir, ok := k.r.Volumes[p.Name]
		if !ok {
			return nil, fmt.Errorf("%w: this session has no volume %q", checkpoint.ErrFormat, p.Name)
		}
		return k.tree(dir, p.Kind)
	case checkpoint.KindShm:
		dir := k.r.Containers[0].ShmDir
		if dir == "" {
			return nil, fmt.Errorf("%w: the source has a /dev/shm of its own, this pod uses the node's", checkpoint.ErrFormat)
		}
		return k.tree(dir, p.Kind)
	}
	return nil, fmt.Errorf("%w: no place for a part of kind %s", checkpoint.ErrFormat, p.Kind)
}

func (k *restoreSink) file(path string, flags int) (checkpoint.PartSink, error) {
	f, err := openRegular(path, flags)
	if err != nil {
		return nil, err
	}
	s := &fileSink{f: f, closed: func(s *fileSink) { delete(k.open, s) }}
	k.open[s] = func() { f.Close() }
	return s, nil
}

func (k *restoreSink) tree(dir string, kind checkpoint.Kind) (checkpoint.PartSink, error) {
	t, err := tree.Receive(dir, kind)
	if err != nil {
		return nil, err
	}
	k.open[t] = t.Abort
	return t, nil
}

// Round implements checkpoint.Sink.
func (k *restoreSink) Round(r checkpoint.Round) error {
	k.round(r)
	return nil
}

// complete makes the images ready for CRIU: every store becomes the pages file of
// its map.
func (k *restoreSink) complete() error {
	for container, stores := range k.pages {
		if err := criu.Place(k.r.images(container), stores); err != nil {
			return fmt.Errorf("memory of container %s: %w", container, err)
		}
	}
	return nil
}

// abort closes what an interrupted stream has left open.
func (k *restoreSink) abort() {
	for _, f := range k.open {
		f()
	}
}

// fileSink writes one plain file.
type fileSink struct {
	f      *os.File
	closed func(*fileSink)
}

func (s *fileSink) Entry(*checkpoint.Entry) error {
	return fmt.Errorf("%w: an entry in a file", checkpoint.ErrFormat)
}

func (s *fileSink) Data(off int64, b []byte) error {
	_, err := s.f.WriteAt(b, off)
	return err
}

func (s *fileSink) Pages(uint32, uint64, uint32, []byte) error {
	return fmt.Errorf("%w: pages in a file", checkpoint.ErrFormat)
}

func (s *fileSink) Close() error {
	s.closed(s)
	return s.f.Close()
}

// discard takes the log for a container that keeps none.
type discard struct{}

func (discard) Entry(*checkpoint.Entry) error              { return nil }
func (discard) Data(int64, []byte) error                   { return nil }
func (discard) Pages(uint32, uint64, uint32, []byte) error { return nil }
func (discard) Close() error                               { return nil }
