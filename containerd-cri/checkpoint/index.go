package checkpoint

import "sort"

// Index maps runs of pages of an address space to consecutive places. The zero
// value is empty. Pages that are added in ascending order cost constant time each.
type Index struct {
	runs []indexRun // sorted by address, not overlapping
}

type indexRun struct {
	addr  uint64
	pages uint64
	at    int64
}

func (r indexRun) end() uint64 { return r.addr + r.pages*PageSize }

// Len is the number of runs.
func (x *Index) Len() int { return len(x.runs) }

// End is the address behind the last page, 0 when there is none.
func (x *Index) End() uint64 {
	if len(x.runs) == 0 {
		return 0
	}
	return x.runs[len(x.runs)-1].end()
}

// Lookup returns how many of the pages from an address on are known, with the place of
// the first one, or how many are unknown; at least 1 and at most limit, which is not 0.
// Places of the pages it counts are consecutive.
func (x *Index) Lookup(addr, limit uint64) (n uint64, at int64, known bool) {
	if addr >= x.End() {
		return limit, 0, false
	}
	r := x.runs[sort.Search(len(x.runs), func(i int) bool { return x.runs[i].end() > addr })]
	if addr >= r.addr {
		skip := (addr - r.addr) / PageSize
		return min(limit, r.pages-skip), r.at + int64(skip), true
	}
	return min(limit, (r.addr-addr)/PageSize), 0, false
}

// Add adds pages that are unknown, at consecutive places.
func (x *Index) Add(addr, pages uint64, at int64) {
	i := len(x.runs)
	if addr < x.End() {
		i = sort.Search(len(x.runs), func(i int) bool { return x.runs[i].addr > addr })
	}
	if i > 0 {
		if p := &x.runs[i-1]; p.end() == addr && p.at+int64(p.pages) == at {
			p.pages += pages
			return
		}
	}
	x.runs = append(x.runs, indexRun{})
	copy(x.runs[i+1:], x.runs[i:])
	x.runs[i] = indexRun{addr: addr, pages: pages, at: at}
}

// Each calls f for all runs in ascending order.
func (x *Index) Each(f func(addr, pages uint64, at int64) error) error {
	for _, r := range x.runs {
		if err := f(r.addr, r.pages, r.at); err != nil {
			return err
		}
	}
	return nil
}
