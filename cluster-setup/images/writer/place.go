package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// place is written to by one goroutine.
type place struct {
	name string
	// write changes a piece of the place, read returns all of it.
	write func(offset int, data []byte) error
	read  func() ([]byte, error)

	mu     sync.Mutex
	want   []byte
	writes uint64
}

const (
	fileSize   = 4 << 20
	memorySize = 32 << 20
	pieceSize  = 4 << 10
)

func open() ([]*place, error) {
	var places []*place
	for name, path := range map[string]string{"layer": "/written", "volume": "/volume/written", "shm": "/dev/shm/written"} {
		f, err := create(path)
		if err != nil {
			return nil, err
		}
		// Others read by the name, not by the descriptor that has written.
		places = append(places, fill(name, fileSize, onFile(f), func() ([]byte, error) { return os.ReadFile(path) }))
	}
	deleted, err := create("/deleted")
	if err != nil {
		return nil, err
	}
	if err := os.Remove("/deleted"); err != nil {
		return nil, err
	}
	places = append(places, fill("deleted", fileSize, onFile(deleted), func() ([]byte, error) {
		return io.ReadAll(io.NewSectionReader(deleted, 0, fileSize))
	}))
	mapped, err := create("/volume/mapped")
	if err != nil {
		return nil, err
	}
	shared, err := unix.Mmap(int(mapped.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map a file: %w", err)
	}
	places = append(places, fill("mapped", fileSize, func(offset int, data []byte) error {
		copy(shared[offset:], data)
		return nil
	}, func() ([]byte, error) { return os.ReadFile("/volume/mapped") }))
	memory := make([]byte, memorySize)
	places = append(places, fill("memory", memorySize, func(offset int, data []byte) error {
		copy(memory[offset:], data)
		return nil
	}, func() ([]byte, error) { return memory, nil }))
	names, err := comeAndGo("/volume/names")
	if err != nil {
		return nil, err
	}
	return append(places, names), nil
}

func create(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return nil, err
	}
	return f, f.Truncate(fileSize)
}

func onFile(f *os.File) func(int, []byte) error {
	return func(offset int, data []byte) error {
		_, err := f.WriteAt(data, int64(offset))
		return err
	}
}

func fill(name string, size int, write func(int, []byte) error, read func() ([]byte, error)) *place {
	return &place{name: name, write: write, read: read, want: make([]byte, size)}
}

func (p *place) run(ctx context.Context) error {
	data := make([]byte, pieceSize)
	for ctx.Err() == nil {
		n := 1 + rand.IntN(pieceSize)
		offset := rand.IntN(len(p.want) - n)
		for i := range n {
			data[i] = byte(rand.Uint32())
		}
		if err := p.step(offset, data[:n]); err != nil {
			return fmt.Errorf("write to %s: %w", p.name, err)
		}
		time.Sleep(pause)
	}
	return nil
}

func (p *place) step(offset int, data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.write(offset, data); err != nil {
		return err
	}
	copy(p.want[offset:], data)
	p.writes++
	return nil
}

// compare expects the lock to be held.
func (p *place) compare() error {
	have, err := p.read()
	if err != nil {
		return err
	}
	if len(have) != len(p.want) {
		return fmt.Errorf("%d bytes, there should be %d", len(have), len(p.want))
	}
	if bytes.Equal(have, p.want) {
		return nil
	}
	first, different := -1, 0
	for i := range have {
		if have[i] != p.want[i] {
			if first < 0 {
				first = i
			}
			different++
		}
	}
	return fmt.Errorf("%d bytes differ after %d writes, the first at %d", different, p.writes, first)
}

// kept is how many files exist at a time in the place of files that come and go.
const kept = 64

// comeAndGo is a place of files: each write makes one, and the oldest goes when there are enough.
func comeAndGo(dir string) (*place, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var names []string
	next := 0
	contents := map[string][]byte{}
	p := &place{name: "names", want: make([]byte, pieceSize+1)}
	p.write = func(_ int, data []byte) error {
		name := fmt.Sprintf("%08d", next)
		next++
		if err := os.WriteFile(filepath.Join(dir, name+".new"), data, 0o600); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(dir, name+".new"), filepath.Join(dir, name)); err != nil {
			return err
		}
		names, contents[name] = append(names, name), slices.Clone(data)
		if len(names) > kept {
			delete(contents, names[0])
			if err := os.Remove(filepath.Join(dir, names[0])); err != nil {
				return err
			}
			names = names[1:]
		}
		return nil
	}
	p.read = func() ([]byte, error) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		if len(entries) != len(names) {
			return nil, fmt.Errorf("%d files, there should be %d", len(entries), len(names))
		}
		for i, e := range entries {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			if e.Name() != names[i] || !bytes.Equal(b, contents[names[i]]) {
				return nil, fmt.Errorf("file %s should be %s, or its content differs", e.Name(), names[i])
			}
		}
		return p.want, nil
	}
	return p, nil
}
