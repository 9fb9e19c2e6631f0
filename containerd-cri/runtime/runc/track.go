package runc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
)

// tracker sends memory of running processes and remembers a 64-bit sum of every page
// that it has sent. A page is sent again when its sum is another one. Nothing is done
// to the processes for that: they are only read, so whatever they do meanwhile (fork,
// exec, map, unmap) makes some of the work useless, never the result wrong. The price
// is that every round, the final one too, reads all pages, which is several times
// faster than sending them.
//
// The sum is one of the copy that was sent: a page that was written while it was
// copied has another sum once it is still.
type tracker struct {
	c         runtime.Container
	buf       []byte
	regions   []pageRegion
	processes map[int]*process // by number in the container
	kept      *atomic.Int64    // chunks of all containers of the node
}

// process is what was sent of one process.
type process struct {
	part  *checkpoint.PartWriter
	index *checkpoint.Index
	sums  []*[chunk]uint64
	next  int64 // pages that have a sum
}

// chunk is how many sums are allocated at once. maxKept bounds those of all containers
// that move at a time to 32 MiB; what is beyond their 16 GiB is sent by every round.
// maxRuns bounds what a process with scattered pages costs.
const (
	chunk   = 1 << 13
	maxKept = 1 << 22 / chunk
	maxRuns = 1 << 16
)

// keep makes room for the sums of pages that are new and returns the place of the
// first; false when there is none.
func (t *tracker) keep(p *process, addr, pages uint64) (at int64, ok bool) {
	if p.index.Len() >= maxRuns {
		return 0, false
	}
	at = p.next
	for int64(len(p.sums))*chunk < at+int64(pages) {
		if t.kept.Add(1) > maxKept {
			t.kept.Add(-1)
			return 0, false
		}
		p.sums = append(p.sums, new([chunk]uint64))
	}
	p.index.Add(addr, pages, at)
	p.next += int64(pages)
	return at, true
}

func (p *process) sum(at int64) *uint64 { return &p.sums[at/chunk][at%chunk] }

var _ runtime.Memory = (*tracker)(nil)

// Track implements runtime.Runtime.
func (r *Runtime) Track(c runtime.Container) runtime.Memory {
	return &tracker{c: c, buf: make([]byte, checkpoint.MaxData), regions: make([]pageRegion, 1024), processes: map[int]*process{}, kept: &r.kept}
}

// part returns the process of a number, with its part begun.
func (t *tracker) part(out *checkpoint.Writer, pid int) (*process, error) {
	if p := t.processes[pid]; p != nil {
		return p, nil
	}
	w, err := out.Begin(checkpoint.Part{Kind: checkpoint.KindPages, Container: t.c.Name, Name: criu.PagesName(pid)})
	if err != nil {
		return nil, err
	}
	p := &process{part: w, index: checkpoint.NewIndex()}
	t.processes[pid] = p
	return p, nil
}

// end completes all parts, those of processes that have ended too.
func (t *tracker) end() error {
	for _, pid := range slices.Sorted(maps.Keys(t.processes)) {
		if err := t.processes[pid].part.Close(); err != nil {
			return err
		}
	}
	return nil
}

// Close implements runtime.Memory.
func (t *tracker) Close() {
	for _, p := range t.processes {
		t.kept.Add(-int64(len(p.sums)))
	}
	t.processes = nil
}

// Round implements runtime.Memory.
func (t *tracker) Round(ctx context.Context, out *checkpoint.Writer, round uint32) (uint64, error) {
	pids, err := containerPids(t.c)
	if err != nil {
		return 0, err
	}
	var sent uint64
	for _, pid := range slices.Sorted(maps.Keys(pids)) {
		n, err := t.round(ctx, out, round, pid, pids[pid])
		sent += n
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // It has ended meanwhile.
		}
		if err != nil {
			return sent, fmt.Errorf("memory of process %d of container %s: %w", pid, t.c.Name, err)
		}
	}
	return sent, nil
}

func (t *tracker) round(ctx context.Context, out *checkpoint.Writer, round uint32, pid, host int) (sent uint64, err error) {
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", host))
	if err != nil {
		return 0, err
	}
	defer pagemap.Close()
	p, err := t.part(out, pid)
	if err != nil {
		return 0, err
	}
	m := &memory{pid: host}
	flush := func() error {
		n, err := t.live(p, m, round)
		sent += n
		return errors.Join(err, ctx.Err())
	}
	err = privatePages(pagemap, t.regions, func(addr, end uint64) error {
		for addr < end {
			n := min(uint64(len(t.buf)-m.size), end-addr)
			m.add(addr, int(n))
			addr += n
			if m.size == len(t.buf) || len(m.remote) == maxRanges {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	return sent, err
}

// live sends the gathered ranges of a running process. Pages that can not be read are
// left out: they have gone since they were seen, or the dump will read them by other means.
func (t *tracker) live(p *process, m *memory, round uint32) (sent uint64, err error) {
	ranges := m.remote
	for len(ranges) > 0 {
		size := 0
		for _, r := range ranges {
			size += r.Len
		}
		local := []unix.Iovec{{Base: &t.buf[0]}}
		local[0].SetLen(size)
		n, err := unix.ProcessVMReadv(m.pid, local, ranges, 0)
		if err != nil && !errors.Is(err, unix.EFAULT) {
			return sent, err
		}
		got := max(n, 0) &^ (checkpoint.PageSize - 1)
		failed := got < size
		for b := t.buf[:got]; len(b) > 0; {
			r := &ranges[0]
			k := min(r.Len, len(b))
			n, err := t.pages(p, round, uint64(r.Base), b[:k], true)
			sent += n
			if err != nil {
				return sent, err
			}
			b = b[k:]
			if ranges = skip(ranges, k); len(ranges) == 0 {
				break
			}
		}
		if failed {
			ranges = skip(ranges, checkpoint.PageSize)
		}
	}
	m.size, m.remote = 0, m.remote[:0]
	return sent, nil
}

// skip takes bytes off the first range.
func skip(ranges []unix.RemoteIovec, n int) []unix.RemoteIovec {
	r := &ranges[0]
	r.Base, r.Len = r.Base+uintptr(n), r.Len-n
	if r.Len == 0 {
		return ranges[1:]
	}
	return ranges
}

// What becomes of a page.
type fate uint8

const (
	same fate = iota
	zero
	full
)

// pages sends those pages that are not what was sent of them before, zero ones by
// name only, and remembers them if they may come again. It returns how many it sent.
func (t *tracker) pages(p *process, round uint32, addr uint64, b []byte, again bool) (sent uint64, err error) {
	for len(b) > 0 {
		n, at, known := p.index.Lookup(addr, uint64(len(b)/checkpoint.PageSize))
		size := int(n) * checkpoint.PageSize
		keep := again
		if !known && again {
			at, keep = t.keep(p, addr, n)
		}
		begin, fateOfRun := 0, same
		for i := 0; i <= size; i += checkpoint.PageSize {
			f := same
			if i < size {
				var sum uint64
				sum, f = sumOf(b[i : i+checkpoint.PageSize])
				k := at + int64(i/checkpoint.PageSize)
				if known && *p.sum(k) == sum {
					f = same
				} else if keep {
					*p.sum(k) = sum
				}
			}
			if i < size && f == fateOfRun {
				continue
			}
			count := uint32(i-begin) / checkpoint.PageSize
			switch {
			case count == 0 || fateOfRun == same:
				err = nil
			case fateOfRun == zero:
				err = p.part.ZeroPages(round, addr+uint64(begin), count)
			default:
				err = p.part.Pages(round, addr+uint64(begin), b[begin:i])
			}
			if err != nil {
				return sent, err
			}
			if fateOfRun != same {
				sent += uint64(count)
			}
			begin, fateOfRun = i, f
		}
		addr, b = addr+uint64(size), b[size:]
	}
	return sent, nil
}

var zeroPage [checkpoint.PageSize]byte

// zeroSum stands for a page of zeroes, which is found faster than its sum.
const zeroSum = 1

func sumOf(page []byte) (uint64, fate) {
	if page[0] == 0 && bytes.Equal(page, zeroPage[:]) {
		return zeroSum, zero
	}
	return xxhash.Sum64(page), full
}

// PAGEMAP_SCAN of linux/fs.h, since Linux 6.7.
const (
	pagemapScan = 0xc0606610

	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPFNZero = 1 << 5

	// lastAddress is the end of the lower half of a four-level page table. What lies
	// above is left to the dump.
	lastAddress = 1<<47 - checkpoint.PageSize
)

type scanArg struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages   uint64
	categoryInverted, categoryMask, categoryAnyOf, returnMask uint64
}

type pageRegion struct{ start, end, categories uint64 }

// privatePages calls f for the ranges of private memory that exist, in ascending
// order. Without PAGEMAP_SCAN there are none. The kernel writes to vec, which must not
// be on a stack.
func privatePages(pagemap *os.File, vec []pageRegion, f func(start, end uint64) error) error {
	arg := scanArg{
		end: lastAddress, vec: uint64(uintptr(unsafe.Pointer(&vec[0]))), vecLen: uint64(len(vec)),
		categoryInverted: pageIsFile | pageIsPFNZero, categoryMask: pageIsFile | pageIsPFNZero,
		categoryAnyOf: pageIsPresent | pageIsSwapped, returnMask: pageIsPresent,
	}
	arg.size = uint64(unsafe.Sizeof(arg))
	for arg.start < arg.end {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, pagemap.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.ENOTTY, unix.EINVAL:
			return nil
		default:
			return fmt.Errorf("pagemap: %w", errno)
		}
		for _, r := range vec[:n] {
			if err := f(r.start, r.end); err != nil {
				return err
			}
		}
		if arg.walkEnd <= arg.start {
			return nil
		}
		arg.start = arg.walkEnd
	}
	return nil
}
