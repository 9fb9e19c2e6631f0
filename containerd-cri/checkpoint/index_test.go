package checkpoint

import (
	"math/rand/v2"
	"testing"
)

// TestIndex compares an index with a plain map, page by page, while pages are added in
// several orders.
func TestIndex(t *testing.T) {
	const n = 500
	rnd := rand.New(rand.NewPCG(5, 6))
	for name, next := range map[string]func(i int) uint64{
		"ascending":  func(i int) uint64 { return uint64(i) },
		"descending": func(i int) uint64 { return uint64(n - 1 - i) },
		"random":     func(int) uint64 { return rnd.Uint64N(n) },
	} {
		t.Run(name, func(t *testing.T) {
			x, model := NewIndex(), map[uint64]int64{}
			place := int64(0)
			for i := range n {
				first := next(i)
				count, at, known := x.Lookup(first*PageSize, 1+rnd.Uint64N(5))
				if count == 0 {
					t.Fatalf("no page at %d", first)
				}
				for k := range count {
					if want, ok := model[first+k]; ok != known || known && want != at+int64(k) {
						t.Fatalf("page %d: known %v at %d, want %v at %d", first+k, known, at+int64(k), ok, want)
					}
				}
				if known {
					continue
				}
				x.Add(first*PageSize, count, place)
				for k := range count {
					model[first+k] = place + int64(k)
				}
				place += int64(count)
				if rnd.IntN(2) == 0 {
					place++ // The next one does not join.
				}
			}
			end, pages := uint64(0), 0
			_ = x.Each(func(addr, count uint64, at int64) error {
				if addr < end {
					t.Errorf("the run at %#x comes after %#x", addr, end)
				}
				end, pages = addr+count*PageSize, pages+int(count)
				return nil
			})
			if end != x.End() || pages != len(model) {
				t.Errorf("%d pages up to %#x, want %d up to %#x", pages, end, len(model), x.End())
			}
		})
	}
	x := NewIndex()
	for i := range uint64(100) {
		x.Add(i*PageSize, 1, int64(i))
	}
	if x.Len() != 1 {
		t.Errorf("pages that follow each other are %d runs", x.Len())
	}
}
