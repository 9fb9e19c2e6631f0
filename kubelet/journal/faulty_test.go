package journal

import (
	"errors"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
)

// memory is a file system that tells what is durable from what is not. It can fail
// any step and lose power after any step.
type memory struct {
	files map[string]*file // names as a running process sees them
	// pending are changes of names since the last SyncDir; a power loss keeps any
	// prefix of them.
	durable map[string]*file
	pending []func(map[string]*file)

	step int
	// failAt makes that step fail with err, half done if it can be.
	failAt int
	err    error
	// fullUntil makes writes fail with err as long as the file of that name exists.
	full func(path string) error
}

type file struct {
	content []byte
	// synced is what a power loss leaves; torn is what it may leave instead.
	synced bool
}

var errLost = errors.New("power lost")

func newMemory() *memory {
	return &memory{files: map[string]*file{}, durable: map[string]*file{}, failAt: -1}
}

// next counts a step and says whether it fails.
func (m *memory) next() error {
	m.step++
	if m.step-1 == m.failAt {
		return m.err
	}
	return nil
}

func (m *memory) MakeDir(string) error { return nil }

func (m *memory) List(dir string) ([]string, error) {
	var names []string
	for p := range m.files {
		names = append(names, filepath.Base(p))
	}
	slices.Sort(names)
	return names, nil
}

func (m *memory) Read(path string, max int64) ([]byte, error) {
	f, ok := m.files[path]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return f.content, nil
}

func (m *memory) change(c func(map[string]*file)) {
	c(m.files)
	m.pending = append(m.pending, c)
}

func (m *memory) WriteSync(path string, content []byte) error {
	if m.full != nil {
		if err := m.full(path); err != nil {
			return err
		}
	}
	f := &file{}
	if err := m.next(); err != nil { // create
		return err
	}
	m.change(func(names map[string]*file) { names[path] = f })
	f.content = content[:len(content)/2]
	if err := m.next(); err != nil { // write
		return err
	}
	f.content = content
	if err := m.next(); err != nil { // sync
		return err
	}
	f.synced = true
	return nil
}

func (m *memory) Rename(from, to string) error {
	if err := m.next(); err != nil {
		return err
	}
	if m.files[from] == nil {
		return fs.ErrNotExist
	}
	m.change(func(names map[string]*file) {
		names[to] = names[from]
		delete(names, from)
	})
	return nil
}

func (m *memory) Remove(path string) error {
	if err := m.next(); err != nil {
		return err
	}
	if m.files[path] == nil {
		return fs.ErrNotExist
	}
	m.change(func(names map[string]*file) { delete(names, path) })
	return nil
}

func (m *memory) SyncDir(string) error {
	if err := m.next(); err != nil {
		return err
	}
	m.durable, m.pending = maps.Clone(m.files), nil
	return nil
}

// afterPowerLoss returns the file systems that a machine may find: any prefix of the
// changes of names, and of files that were not synced a half.
func (m *memory) afterPowerLoss() []*memory {
	var out []*memory
	for keep := range len(m.pending) + 1 {
		names := maps.Clone(m.durable)
		for _, c := range m.pending[:keep] {
			c(names)
		}
		n := newMemory()
		for p, f := range names {
			if f == nil {
				continue
			}
			content := f.content
			if !f.synced {
				content = content[:len(content)/2]
			}
			n.files[p] = &file{content: content, synced: true}
		}
		n.durable = maps.Clone(n.files)
		out = append(out, n)
	}
	return out
}
