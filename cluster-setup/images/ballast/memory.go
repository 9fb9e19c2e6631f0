package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const pageSize = 4096

// memory is filled with pages that look random but follow from their number and version, so that every byte can be checked later.
type memory struct {
	bytes  []byte
	writes atomic.Uint64

	mu       sync.Mutex
	versions []uint32 // How often each page was written anew.
}

func newMemory(size int) (*memory, error) {
	m := &memory{}
	if size == 0 {
		return m, nil
	}
	// Mapped directly: the garbage collector neither moves nor counts it.
	bytes, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	m.bytes, m.versions = bytes, make([]uint32, size/pageSize)
	return m, nil
}

func (m *memory) page(index int) []byte { return m.bytes[index*pageSize : (index+1)*pageSize] }

// words calls visit with the content of a page, word by word. The generator is splitmix64: fast, and nothing compresses it.
func words(index int, version uint32, visit func(offset int, word uint64) bool) bool {
	state := uint64(index)<<32 | uint64(version)
	for offset := 0; offset < pageSize; offset += 8 {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		if !visit(offset, z^z>>31) {
			return false
		}
	}
	return true
}

func (m *memory) write(index int) {
	page := m.page(index)
	words(index, m.versions[index], func(offset int, word uint64) bool {
		binary.LittleEndian.PutUint64(page[offset:], word)
		return true
	})
}

func (m *memory) fill() {
	for index := range m.versions {
		m.mu.Lock()
		m.write(index)
		m.mu.Unlock()
	}
}

// check compares every page with what it must hold.
func (m *memory) check() error {
	for index := range m.versions {
		m.mu.Lock()
		page := m.page(index)
		same := words(index, m.versions[index], func(offset int, word uint64) bool {
			return binary.LittleEndian.Uint64(page[offset:]) == word
		})
		m.mu.Unlock()
		if !same {
			return fmt.Errorf("page %d does not hold what was written", index)
		}
	}
	return nil
}

// dirty rewrites pages chosen at random, at the given number of bytes per second, in small even portions.
func (m *memory) dirty(ctx context.Context, perSecond int) {
	const portions = 100
	ticker := time.NewTicker(time.Second / portions)
	defer ticker.Stop()
	var owed int
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		for owed += perSecond / portions; owed >= pageSize; owed -= pageSize {
			index := rand.IntN(len(m.versions))
			m.mu.Lock()
			m.versions[index]++
			m.write(index)
			m.mu.Unlock()
			m.writes.Add(1)
		}
	}
}
