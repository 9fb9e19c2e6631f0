package runc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
)

// sender writes the images of a dump, and the memory of the processes that was not
// sent before, to the stream.
type sender struct {
	ctx    context.Context
	images string
	out    *checkpoint.Writer
	round  uint32
	res    *runtime.Dumped
	*tracker
}

func (s *sender) send() error {
	files, err := os.ReadDir(s.images)
	if err != nil {
		return err
	}
	pids, err := containerPids(s.c)
	if err != nil {
		return err
	}
	// The pages files of processes go as pages, everything else as it is.
	sent := map[string]bool{}
	for _, e := range files {
		pid, ok := criu.ProcessPagemap(e.Name())
		if !ok {
			continue
		}
		host, ok := pids[pid]
		if !ok {
			return fmt.Errorf("process %d of container %s is in the dump but not in its control group", pid, s.c.Name)
		}
		pages, err := s.process(e.Name(), pid, host)
		if err != nil {
			return fmt.Errorf("memory of process %d of container %s: %w", pid, s.c.Name, err)
		}
		sent[e.Name()], sent[pages] = true, true
	}
	for _, e := range files {
		if sent[e.Name()] || !e.Type().IsRegular() {
			continue
		}
		if err := s.image(e.Name()); err != nil {
			return fmt.Errorf("image %s of container %s: %w", e.Name(), s.c.Name, err)
		}
		if criu.IsPages(e.Name()) {
			if info, err := e.Info(); err == nil {
				s.res.MemoryBytes += uint64(info.Size())
			}
		}
	}
	return s.end()
}

func (s *sender) image(name string) error {
	f, err := os.Open(filepath.Join(s.images, name))
	if err != nil {
		return err
	}
	defer f.Close()
	return s.file(name, f)
}

func (s *sender) file(name string, in io.Reader) error {
	w, err := s.out.Begin(checkpoint.Part{Kind: checkpoint.KindImage, Container: s.c.Name, Name: name})
	if err != nil {
		return err
	}
	var off int64
	for {
		n, err := io.ReadFull(in, s.buf)
		if n > 0 {
			if err := w.Data(off, s.buf[:n]); err != nil {
				return err
			}
			off += int64(n)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return w.Close()
		}
		if err := errors.Join(err, s.ctx.Err()); err != nil {
			return err
		}
	}
}

// process sends the map and the pages of one address space and returns the name of
// the pages file.
func (s *sender) process(pagemap string, pid, host int) (string, error) {
	f, err := os.Open(filepath.Join(s.images, pagemap))
	if err != nil {
		return "", err
	}
	defer f.Close()
	// The map is small; it is rewritten as the map of an ordinary dump.
	var complete bytes.Buffer
	if err := criu.Complete(f, &complete); err != nil {
		return "", err
	}
	if err := s.file(pagemap, &complete); err != nil {
		return "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	p, err := criu.OpenPagemap(f)
	if err != nil {
		return "", err
	}
	name := criu.PagesFile(p.ID)
	eager, err := os.Open(filepath.Join(s.images, name))
	if err != nil {
		return "", err
	}
	defer eager.Close()
	w, err := s.part(s.out, pid)
	if err != nil {
		return "", err
	}
	m := &memory{pid: host}
	defer m.close()
	for {
		run, err := p.Next()
		if errors.Is(err, io.EOF) {
			return name, s.flush(w, m)
		}
		if err = errors.Join(err, s.ctx.Err()); err != nil {
			return "", err
		}
		s.res.MemoryBytes += run.Pages * checkpoint.PageSize
		if run.Lazy {
			if err := s.lazy(w, m, run); err != nil {
				return "", err
			}
			continue
		}
		if err := s.flush(w, m); err != nil {
			return "", err
		}
		for addr, left := run.Addr, run.Pages*checkpoint.PageSize; left > 0; {
			b := s.buf[:min(uint64(len(s.buf)), left)]
			if _, err := io.ReadFull(eager, b); err != nil {
				return "", fmt.Errorf("%s: %w", name, err)
			}
			if err := s.pages(w, addr, b); err != nil {
				return "", err
			}
			addr, left = addr+uint64(len(b)), left-uint64(len(b))
		}
	}
}

// lazy gathers runs until they fill the buffer.
func (s *sender) lazy(w *process, m *memory, run criu.Run) error {
	for left := run.Pages * checkpoint.PageSize; left > 0; {
		n := min(uint64(len(s.buf)-m.size), left)
		m.add(run.Addr, int(n))
		run.Addr, left = run.Addr+n, left-n
		if m.size == len(s.buf) || len(m.remote) == maxRanges {
			if err := s.flush(w, m); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush reads the gathered runs and sends them.
func (s *sender) flush(w *process, m *memory) error {
	if m.size == 0 {
		return nil
	}
	if err := m.read(s.buf[:m.size]); err != nil {
		return err
	}
	b := s.buf
	for _, r := range m.remote {
		if err := s.pages(w, uint64(r.Base), b[:r.Len]); err != nil {
			return err
		}
		b = b[r.Len:]
	}
	m.size, m.remote = 0, m.remote[:0]
	return nil
}

// pages sends those pages that are not what was sent of them before.
func (s *sender) pages(w *process, addr uint64, b []byte) error {
	n, err := s.tracker.pages(w, s.round, addr, b, false)
	s.res.Pages += n
	return err
}

// maxRanges is how many ranges one system call reads; the kernel takes 1024.
const maxRanges = 512

// memory reads ranges of the memory of a process.
type memory struct {
	pid    int
	size   int
	remote []unix.RemoteIovec
	mem    *os.File
}

func (m *memory) add(addr uint64, n int) {
	if k := len(m.remote); k > 0 && uint64(m.remote[k-1].Base)+uint64(m.remote[k-1].Len) == addr {
		m.remote[k-1].Len += n
	} else {
		m.remote = append(m.remote, unix.RemoteIovec{Base: uintptr(addr), Len: n})
	}
	m.size += n
}

func (m *memory) read(b []byte) error {
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	n, err := unix.ProcessVMReadv(m.pid, local, m.remote, 0)
	if err == nil && n == len(b) {
		return nil
	}
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", m.pid, runtime.ErrGone)
	}
	// Pages that the process itself may not read, for example guarded ones that were
	// written before: /proc/PID/mem reads them.
	if m.mem == nil {
		if m.mem, err = os.Open(fmt.Sprintf("/proc/%d/mem", m.pid)); err != nil {
			return err
		}
	}
	for _, r := range m.remote {
		if _, err := m.mem.ReadAt(b[:r.Len], int64(r.Base)); err != nil {
			return fmt.Errorf("%d bytes at %#x: %w", r.Len, r.Base, err)
		}
		b = b[r.Len:]
	}
	return nil
}

func (m *memory) close() {
	if m.mem != nil {
		m.mem.Close()
	}
}

// containerPids maps the processes of a container from their numbers in its PID
// namespace, which images use, to those on the node.
func containerPids(c runtime.Container) (map[int]int, error) {
	f, err := cgroups{}.of(c)
	if err != nil {
		return nil, err
	}
	all, err := f.pids()
	if err != nil {
		return nil, err
	}
	depth := 0
	if ns, err := nsPids(c.Pid); err != nil {
		return nil, err
	} else {
		depth = len(ns) - 1
	}
	out := map[int]int{}
	for _, pid := range all {
		ns, err := nsPids(pid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // It has ended meanwhile.
		} else if err != nil {
			return nil, err
		}
		if len(ns) > depth {
			out[ns[depth]] = pid
		}
	}
	return out, nil
}

// nsPids returns the numbers of a process from this PID namespace inwards.
func nsPids(pid int) ([]int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, "NSpid:")
		if !ok {
			continue
		}
		var out []int
		for _, w := range strings.Fields(rest) {
			n, err := strconv.Atoi(w)
			if err != nil {
				return nil, err
			}
			out = append(out, n)
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	return nil, fmt.Errorf("process %d has no numbers in PID namespaces", pid)
}
