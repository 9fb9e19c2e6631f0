package checkpoint

import "github.com/google/btree"

// Index maps runs of pages of an address space to consecutive places. Create it with
// NewIndex. In whatever order pages come, each costs the logarithm of the number of runs.
type Index struct {
	runs *btree.BTreeG[indexRun] // by address, not overlapping
	end  uint64
}

type indexRun struct {
	addr  uint64
	pages uint64
	at    int64
}

func (r indexRun) end() uint64 { return r.addr + r.pages*PageSize }

// NewIndex returns an empty index.
func NewIndex() *Index {
	return &Index{runs: btree.NewG(64, func(a, b indexRun) bool { return a.addr < b.addr })}
}

// Len is the number of runs.
func (x *Index) Len() int { return x.runs.Len() }

// End is the address behind the last page, 0 when there is none.
func (x *Index) End() uint64 { return x.end }

// Lookup returns how many of the pages from an address on are known, with the place of
// the first one, or how many are unknown; at least 1 and at most limit, which is not 0.
// Places of the pages it counts are consecutive.
func (x *Index) Lookup(addr, limit uint64) (n uint64, at int64, known bool) {
	if addr >= x.end {
		return limit, 0, false
	}
	if r, ok := x.before(addr); ok && addr < r.end() {
		skip := (addr - r.addr) / PageSize
		return min(limit, r.pages-skip), r.at + int64(skip), true
	}
	n = limit
	x.runs.AscendGreaterOrEqual(indexRun{addr: addr}, func(r indexRun) bool {
		n = min(limit, (r.addr-addr)/PageSize)
		return false
	})
	return n, 0, false
}

// before returns the last run that begins at an address or before it.
func (x *Index) before(addr uint64) (run indexRun, ok bool) {
	x.runs.DescendLessOrEqual(indexRun{addr: addr}, func(r indexRun) bool {
		run, ok = r, true
		return false
	})
	return run, ok
}

// Add adds pages that are unknown, at consecutive places.
func (x *Index) Add(addr, pages uint64, at int64) {
	r := indexRun{addr: addr, pages: pages, at: at}
	if p, ok := x.before(addr); ok && p.end() == addr && p.at+int64(p.pages) == at {
		r = indexRun{addr: p.addr, pages: p.pages + pages, at: p.at}
	}
	x.runs.ReplaceOrInsert(r)
	x.end = max(x.end, r.end())
}

// Each calls f for all runs in ascending order, until it returns an error.
func (x *Index) Each(f func(addr, pages uint64, at int64) error) (err error) {
	x.runs.Ascend(func(r indexRun) bool {
		err = f(r.addr, r.pages, r.at)
		return err == nil
	})
	return err
}
