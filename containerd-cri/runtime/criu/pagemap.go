package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"google.golang.org/protobuf/proto"

	"podmig.dev/podmig/containerd-cri/checkpoint"
)

// Flags of a run of pages in a pagemap.
const (
	pageParent  = 1 // in the image set before
	pageLazy    = 2 // left in the process
	pagePresent = 4 // in the pages file, in the order of the map
)

// Run is a run of pages of one address space.
type Run struct {
	Addr  uint64
	Pages uint64
	// Lazy runs are not in the pages file: they are read from the process.
	Lazy bool
}

// PagesFile returns the name of a pages file.
func PagesFile(id uint32) string { return fmt.Sprintf("pages-%d.img", id) }

// IsPages tells whether a file of an image set holds pages.
func IsPages(name string) bool {
	return strings.HasPrefix(name, "pages-") && strings.HasSuffix(name, ".img")
}

// PagesName returns the name of the part with the private memory of a process, which
// has one before CRIU gives it a pages file.
func PagesName(pid int) string { return strconv.Itoa(pid) }

// ProcessPagemap returns the number of the process whose private memory a pagemap
// describes, in the PID namespace of the container. Maps of shared memory have
// other names.
func ProcessPagemap(name string) (pid int, ok bool) {
	s, found := strings.CutPrefix(name, "pagemap-")
	if !found {
		return 0, false
	}
	pid, err := strconv.Atoi(strings.TrimSuffix(s, ".img"))
	return pid, err == nil && pid > 0 && strings.HasSuffix(s, ".img")
}

// Pagemap reads a map run by run.
type Pagemap struct {
	// ID is the number of the pages file.
	ID  uint32
	r   *imageReader
	end uint64
}

// OpenPagemap reads the head of a map.
func OpenPagemap(r io.Reader) (*Pagemap, error) {
	in, err := newImageReader(r, magicPagemap)
	if err != nil {
		return nil, err
	}
	var head pagemap.PagemapHead
	if err := in.next(&head); err != nil {
		return nil, fmt.Errorf("%w: no head: %v", ErrImage, err)
	}
	return &Pagemap{ID: head.GetPagesId(), r: in}, nil
}

// Next returns the next run, in ascending order of addresses, or io.EOF.
func (p *Pagemap) Next() (Run, error) {
	var e pagemap.PagemapEntry
	if err := p.r.next(&e); err != nil {
		return Run{}, err
	}
	n, ok := last(&e, pagemapPages)
	if !ok {
		n = uint64(e.GetNrPages())
	}
	run := Run{Addr: e.GetVaddr(), Pages: n, Lazy: e.GetFlags()&pageLazy != 0}
	switch {
	case e.GetInParent() || e.GetFlags()&pageParent != 0:
		return run, fmt.Errorf("%w: pages at %#x are in another image set", ErrImage, run.Addr)
	case e.GetFlags()&(pageLazy|pagePresent) == 0 && e.Flags != nil:
		return run, fmt.Errorf("%w: pages at %#x are nowhere", ErrImage, run.Addr)
	case run.Addr%checkpoint.PageSize != 0 || n == 0 || run.Addr < p.end || run.Addr >= 1<<57 || n > (1<<57-run.Addr)/checkpoint.PageSize:
		return run, fmt.Errorf("%w: %d pages at %#x are no ascending runs of memory", ErrImage, n, run.Addr)
	}
	p.end = run.Addr + n*checkpoint.PageSize
	return run, nil
}

// Complete copies a map of a lazy dump as the map of an ordinary one, in which all
// pages are in the pages file, and joins neighbouring runs.
func Complete(in io.Reader, out io.Writer) error {
	p, err := OpenPagemap(in)
	if err != nil {
		return err
	}
	w := newImageWriter(out, magicPagemap)
	if err := w.write(&pagemap.PagemapHead{PagesId: proto.Uint32(p.ID)}); err != nil {
		return err
	}
	var cur Run
	emit := func() error {
		if cur.Pages == 0 {
			return nil
		}
		return w.write(pagemapEntry(cur, pagePresent))
	}
	for {
		run, err := p.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		if cur.Pages != 0 && cur.Addr+cur.Pages*checkpoint.PageSize == run.Addr {
			cur.Pages += run.Pages
			continue
		}
		if err := emit(); err != nil {
			return err
		}
		cur = run
	}
	if err := emit(); err != nil {
		return err
	}
	return w.flush()
}

func pagemapEntry(r Run, flags uint32) *pagemap.PagemapEntry {
	return with(&pagemap.PagemapEntry{
		Vaddr: proto.Uint64(r.Addr), NrPages: proto.Uint32(uint32(r.Pages)), Flags: proto.Uint32(flags),
	}, pagemapPages, r.Pages)
}

// openPagemapFile opens a map by its path.
func openPagemapFile(path string) (*os.File, *Pagemap, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	p, err := OpenPagemap(f)
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, p, nil
}
