package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// Store keeps the pages of one address space in files in memory. Pages that come
// again replace the earlier ones, whatever the round. It implements
// checkpoint.PartSink.
//
// CRIU reads pages in the order of their map. What comes in ascending order, which
// is nearly everything, goes to the base and is never moved again. What belongs
// before the end of the base, pages that are new in a later round, goes to the rest.
// Place makes an ordinary image of a base that is exactly what the map asks for, or
// an incremental one of the rest with the base as its parent.
type Store struct {
	name       string // of the part
	base, rest pageFile
}

// pageFile is a file of pages and where each of them is.
type pageFile struct {
	path  string
	f     *os.File
	index *checkpoint.Index
	next  int64 // pages in the file
}

// maxPieces bounds the memory of the indexes: some 50 MiB for a process whose every
// second page of eight gigabytes exists.
const maxPieces = 1 << 20

var _ checkpoint.PartSink = (*Store)(nil)

// NewStore creates the files in an existing directory.
func NewStore(dir, name string) (*Store, error) {
	s := &Store{name: name}
	for file, p := range map[string]*pageFile{".base": &s.base, ".rest": &s.rest} {
		p.path, p.index = filepath.Join(dir, name+file), checkpoint.NewIndex()
		f, err := os.OpenFile(p.path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			s.Abort()
			return nil, err
		}
		p.f = f
	}
	return s, nil
}

// Pages implements checkpoint.PartSink.
func (s *Store) Pages(_ uint32, addr uint64, count uint32, b []byte) error {
	left := uint64(count)
	for left > 0 {
		n, p, at, known := s.lookup(addr, left)
		size := int64(n) * checkpoint.PageSize
		var part []byte
		if b != nil {
			part, b = b[:size], b[size:]
		}
		var err error
		switch {
		case known:
			err = p.replace(at, size, part)
		case s.base.index.Len()+s.rest.index.Len() >= maxPieces:
			err = fmt.Errorf("%w: memory in more than %d pieces", checkpoint.ErrFormat, maxPieces)
		case addr >= s.base.index.End():
			err = s.base.append(addr, n, part)
		default:
			err = s.rest.append(addr, n, part)
		}
		if err != nil {
			return err
		}
		addr, left = addr+uint64(size), left-n
	}
	return nil
}

// lookup returns how many pages from an address on are together in one file, which
// one and where, or how many are in neither.
func (s *Store) lookup(addr, limit uint64) (n uint64, p *pageFile, at int64, known bool) {
	n, at, known = s.base.index.Lookup(addr, limit)
	if known {
		return n, &s.base, at, true
	}
	n, at, known = s.rest.index.Lookup(addr, n)
	return n, &s.rest, at, known
}

func (p *pageFile) append(addr, pages uint64, b []byte) error {
	at := p.next
	p.index.Add(addr, pages, at)
	p.next += int64(pages)
	if b == nil {
		// Beyond the end of the file there is a hole, which reads as zero.
		return p.f.Truncate(p.next * checkpoint.PageSize)
	}
	_, err := p.f.WriteAt(b, at*checkpoint.PageSize)
	return err
}

func (p *pageFile) replace(at, size int64, b []byte) error {
	if b == nil {
		return p.punch(at, size)
	}
	_, err := p.f.WriteAt(b, at*checkpoint.PageSize)
	return err
}

func (p *pageFile) punch(at, size int64) error {
	if err := unix.Fallocate(int(p.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at*checkpoint.PageSize, size); err != nil {
		return fmt.Errorf("punch a hole: %w", err)
	}
	return nil
}

// Entry implements checkpoint.PartSink.
func (s *Store) Entry(*checkpoint.Entry) error {
	return fmt.Errorf("%w: an entry in pages", checkpoint.ErrFormat)
}

// Data implements checkpoint.PartSink.
func (s *Store) Data(int64, []byte) error {
	return fmt.Errorf("%w: file data in pages", checkpoint.ErrFormat)
}

// Close implements checkpoint.PartSink. The files stay open until Place or Abort.
func (s *Store) Close() error { return nil }

// Abort closes the files.
func (s *Store) Abort() {
	for _, p := range []*pageFile{&s.base, &s.rest} {
		if p.f != nil {
			_ = p.f.Close()
		}
	}
}

// remove gives the memory of what is left back.
func (s *Store) remove() error {
	s.Abort()
	var errs []error
	for _, p := range []*pageFile{&s.base, &s.rest} {
		if err := os.Remove(p.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// parentDir is where CRIU looks for the image set that another one builds on.
const parentDir = "parent"

// Place gives every map of an image set the pages of its process. Stores are named by
// the process as the maps are. Those without a map are of processes that ended
// before the freeze: they are removed.
func Place(images string, stores []*Store) error {
	byName := map[string]*Store{}
	for _, s := range stores {
		byName[s.name] = s
	}
	files, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	used := map[uint32]bool{}
	for _, e := range files {
		pid, ok := ProcessPagemap(e.Name())
		if !ok {
			continue
		}
		path := filepath.Join(images, e.Name())
		f, p, err := openPagemapFile(path)
		if err != nil {
			return err
		}
		f.Close()
		if used[p.ID] {
			return fmt.Errorf("%w: two maps for %s", ErrImage, PagesFile(p.ID))
		}
		used[p.ID] = true
		s := byName[PagesName(pid)]
		if s == nil {
			return fmt.Errorf("%w: no pages for %s", ErrImage, e.Name())
		}
		if err := s.place(images, path); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	var errs []error
	for _, s := range stores {
		errs = append(errs, s.remove())
	}
	return errors.Join(errs...)
}

// place makes an image of the store.
func (s *Store) place(images, path string) error {
	f, p, err := openPagemapFile(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var segments []segment
	whole, next := true, int64(0)
	err = s.walk(p, func(g segment) error {
		if k := len(segments); k > 0 && segments[k-1].joins(g) {
			segments[k-1].pages += g.pages
		} else {
			segments = append(segments, g)
		}
		whole = whole && g.file == &s.base && g.at == next
		next += int64(g.pages)
		return nil
	})
	if err != nil {
		return err
	}
	pages := filepath.Join(images, PagesFile(p.ID))
	if whole && next == s.base.next {
		return os.Rename(s.base.path, pages)
	}
	parent := filepath.Join(images, parentDir)
	if err := os.Mkdir(parent, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.Rename(s.base.path, filepath.Join(parent, PagesFile(p.ID))); err != nil {
		return err
	}
	if err := s.base.writeMap(filepath.Join(parent, filepath.Base(path)), p.ID); err != nil {
		return err
	}
	if err := s.writeRest(pages, segments); err != nil {
		return err
	}
	return writeMap(path, p.ID, func(entry func(addr, pages uint64, flags uint32) error) error {
		for _, g := range segments {
			flags := uint32(pagePresent)
			if g.file == &s.base {
				flags = pageParent
			}
			if err := entry(g.addr, g.pages, flags); err != nil {
				return err
			}
		}
		return nil
	})
}

// segment is a run of pages of a map that are together in one file.
type segment struct {
	addr, pages uint64
	file        *pageFile
	at          int64
}

func (g segment) joins(next segment) bool {
	return g.file == next.file && g.addr+g.pages*checkpoint.PageSize == next.addr && g.at+int64(g.pages) == next.at
}

// writeRest writes those pages that are not in the base, in the order of the map.
func (s *Store) writeRest(path string, segments []segment) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	buf := make([]byte, 1<<20)
	for _, g := range segments {
		if g.file == &s.base {
			continue
		}
		for at, left := g.at, g.pages; left > 0; {
			n := min(left, uint64(len(buf)/checkpoint.PageSize))
			b := buf[:n*checkpoint.PageSize]
			if _, err := g.file.f.ReadAt(b, at*checkpoint.PageSize); err != nil {
				return err
			}
			if _, err := out.Write(b); err != nil {
				return err
			}
			// Every page is needed once: give its memory back at once.
			if err := g.file.punch(at, int64(len(b))); err != nil {
				return err
			}
			at, left = at+int64(n), left-n
		}
	}
	return out.Close()
}

// walk calls each for the places of the pages of a map, in the order of the map.
func (s *Store) walk(p *Pagemap, each func(segment) error) error {
	for {
		run, err := p.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		for run.Pages > 0 {
			n, file, at, known := s.lookup(run.Addr, run.Pages)
			if !known {
				return fmt.Errorf("%w: the page at %#x is in the map, but never came", ErrImage, run.Addr)
			}
			if err := each(segment{addr: run.Addr, pages: n, file: file, at: at}); err != nil {
				return err
			}
			run.Addr, run.Pages = run.Addr+n*checkpoint.PageSize, run.Pages-n
		}
	}
}

// writeMap writes the map of a file that has its pages in ascending order.
func (p *pageFile) writeMap(path string, id uint32) error {
	return writeMap(path, id, func(entry func(addr, pages uint64, flags uint32) error) error {
		return p.index.Each(func(addr, pages uint64, _ int64) error { return entry(addr, pages, pagePresent) })
	})
}

// writeMap replaces a map.
func writeMap(path string, id uint32, entries func(entry func(addr, pages uint64, flags uint32) error) error) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	w := newImageWriter(f, magicPagemap)
	if err := w.write(&pagemap.PagemapHead{PagesId: proto.Uint32(id)}); err != nil {
		return err
	}
	err = entries(func(addr, pages uint64, flags uint32) error {
		return w.write(pagemapEntry(Run{Addr: addr, Pages: pages}, flags))
	})
	if err := errors.Join(err, w.flush(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
