package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// Store keeps the pages of one address space in a file in memory, with an index.
// Pages that come again replace the earlier ones, whatever the round. It implements
// checkpoint.PartSink. Place brings the pages into the order in which CRIU reads
// them; pages that came in that order in the first place are not moved again.
type Store struct {
	path  string
	f     *os.File
	index []extent // sorted by address, not overlapping
	next  int64    // pages in the file
}

// extent is a run of pages at consecutive places of the file.
type extent struct {
	addr  uint64
	pages uint64
	at    int64 // first page in the file
}

func (e extent) end() uint64 { return e.addr + e.pages*checkpoint.PageSize }

var _ checkpoint.PartSink = (*Store)(nil)

// NewStore creates the file.
func NewStore(path string) (*Store, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	return &Store{path: path, f: f}, nil
}

// Pages implements checkpoint.PartSink.
func (s *Store) Pages(_ uint32, addr uint64, count uint32, b []byte) error {
	left := uint64(count)
	for left > 0 {
		n, at, known := s.lookup(addr, left)
		if !known {
			at = s.next
			s.add(extent{addr: addr, pages: n, at: at})
			s.next += int64(n)
			if b == nil {
				// Beyond the end of the file there is a hole, which reads as zero.
				if err := s.f.Truncate(s.next * checkpoint.PageSize); err != nil {
					return err
				}
			}
		}
		size := int64(n) * checkpoint.PageSize
		switch {
		case b != nil:
			if _, err := s.f.WriteAt(b[:size], at*checkpoint.PageSize); err != nil {
				return err
			}
			b = b[size:]
		case known:
			if err := unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at*checkpoint.PageSize, size); err != nil {
				return fmt.Errorf("punch a hole: %w", err)
			}
		}
		addr, left = addr+uint64(size), left-n
	}
	return nil
}

// lookup returns how many pages from an address on are all known and where the
// first one is, or how many are all unknown.
func (s *Store) lookup(addr, max uint64) (n uint64, at int64, known bool) {
	// The usual case: pages arrive in ascending order.
	i := len(s.index)
	if i > 0 && addr < s.index[i-1].end() {
		i = sort.Search(len(s.index), func(i int) bool { return s.index[i].end() > addr })
	}
	if i == len(s.index) {
		return max, 0, false
	}
	e := s.index[i]
	if addr >= e.addr {
		skip := (addr - e.addr) / checkpoint.PageSize
		return min(max, e.pages-skip), e.at + int64(skip), true
	}
	return min(max, (e.addr-addr)/checkpoint.PageSize), 0, false
}

func (s *Store) add(e extent) {
	i := sort.Search(len(s.index), func(i int) bool { return s.index[i].addr > e.addr })
	if i > 0 {
		if p := &s.index[i-1]; p.end() == e.addr && p.at+int64(p.pages) == e.at {
			p.pages += e.pages
			return
		}
	}
	s.index = append(s.index, extent{})
	copy(s.index[i+1:], s.index[i:])
	s.index[i] = e
}

// Entry implements checkpoint.PartSink.
func (s *Store) Entry(*checkpoint.Entry) error {
	return fmt.Errorf("%w: an entry in pages", checkpoint.ErrFormat)
}

// Data implements checkpoint.PartSink.
func (s *Store) Data(int64, []byte) error {
	return fmt.Errorf("%w: file data in pages", checkpoint.ErrFormat)
}

// Close implements checkpoint.PartSink. The file stays open until Place or Abort.
func (s *Store) Close() error { return nil }

// Abort closes the file.
func (s *Store) Abort() { _ = s.f.Close() }

// Place gives every store of an image set to its map.
func Place(images string, stores []*Store) error {
	files, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	maps := map[string]string{}
	for _, e := range files {
		if _, ok := ProcessPagemap(e.Name()); !ok {
			continue
		}
		f, p, err := openPagemapFile(filepath.Join(images, e.Name()))
		if err != nil {
			return err
		}
		f.Close()
		name := PagesFile(p.ID)
		if maps[name] != "" {
			return fmt.Errorf("%w: two maps for %s", ErrImage, name)
		}
		maps[name] = filepath.Join(images, e.Name())
	}
	for _, s := range stores {
		name := filepath.Base(s.path)
		if maps[name] == "" {
			return fmt.Errorf("%w: no map for %s", ErrImage, name)
		}
		if err := s.Place(maps[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// Place makes the file the pages file of a map: the pages of the map in its order
// and nothing else.
func (s *Store) Place(pagemap string) error {
	defer s.f.Close()
	ordered, err := s.ordered(pagemap)
	if err != nil || ordered {
		return err
	}
	f, p, err := openPagemapFile(pagemap)
	if err != nil {
		return err
	}
	defer f.Close()
	tmp := s.path + ".new"
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	buf := make([]byte, 1<<20)
	err = s.walk(p, func(at int64, n uint64) error {
		for n > 0 {
			b := buf[:min(uint64(len(buf)), n*checkpoint.PageSize)]
			if _, err := s.f.ReadAt(b, at*checkpoint.PageSize); err != nil {
				return err
			}
			if _, err := out.Write(b); err != nil {
				return err
			}
			// Every page is needed once: give its memory back at once.
			if err := unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at*checkpoint.PageSize, int64(len(b))); err != nil {
				return err
			}
			k := uint64(len(b)) / checkpoint.PageSize
			at, n = at+int64(k), n-k
		}
		return nil
	})
	if err != nil {
		return err
	}
	return os.Rename(tmp, s.path)
}

// walk calls each for the places of the pages of a map, in the order of the map.
func (s *Store) walk(p *Pagemap, each func(at int64, n uint64) error) error {
	if want := filepath.Base(s.path); PagesFile(p.ID) != want {
		return fmt.Errorf("%w: a map of %s for %s", ErrImage, PagesFile(p.ID), want)
	}
	for {
		run, err := p.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		for run.Pages > 0 {
			n, at, known := s.lookup(run.Addr, run.Pages)
			if !known {
				return fmt.Errorf("%w: the page at %#x is in the map, but never came", ErrImage, run.Addr)
			}
			if err := each(at, n); err != nil {
				return err
			}
			run.Addr, run.Pages = run.Addr+n*checkpoint.PageSize, run.Pages-n
		}
	}
}

// ordered tells whether the file already is what the map asks for.
func (s *Store) ordered(pagemap string) (bool, error) {
	f, p, err := openPagemapFile(pagemap)
	if err != nil {
		return false, err
	}
	defer f.Close()
	next, ok := int64(0), true
	err = s.walk(p, func(at int64, n uint64) error {
		ok = ok && at == next
		next += int64(n)
		return nil
	})
	return ok && next == s.next, err
}
