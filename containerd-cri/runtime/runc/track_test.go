package runc

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
)

// pageSink collects pages as the target's store does: later rounds replace earlier ones.
type pageSink struct {
	pages map[uint64][]byte
	round map[uint32]int // pages by round
}

func (s *pageSink) Begin(checkpoint.Part) (checkpoint.PartSink, error) { return s, nil }
func (s *pageSink) Round(checkpoint.Round) error                       { return nil }
func (s *pageSink) Entry(*checkpoint.Entry) error                      { return errors.New("an entry") }
func (s *pageSink) Data(int64, []byte) error                           { return errors.New("data") }
func (s *pageSink) Close() error                                       { return nil }
func (s *pageSink) Pages(round uint32, addr uint64, count uint32, b []byte) error {
	for i := range uint64(count) {
		page := make([]byte, checkpoint.PageSize)
		if b != nil {
			copy(page, b[i*checkpoint.PageSize:])
		}
		s.pages[addr+i*checkpoint.PageSize] = page
		s.round[round]++
	}
	return nil
}

// TestTrack sends memory of this process in three rounds, changes some of it in
// between, and takes some of it away.
func TestTrack(t *testing.T) {
	const n = 600 // more than one buffer
	mem, err := unix.Mmap(-1, 0, n*checkpoint.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	base := uint64(uintptr(unsafe.Pointer(&mem[0])))
	page := func(i int) []byte { return mem[i*checkpoint.PageSize : (i+1)*checkpoint.PageSize] }
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range n {
		if i%5 != 0 { // Every fifth page is zero.
			for j := range 16 {
				page(i)[rnd.IntN(checkpoint.PageSize)] = byte(1 + j)
			}
		}
	}
	var stream bytes.Buffer
	out, err := checkpoint.NewWriter(&stream, "s")
	if err != nil {
		t.Fatal(err)
	}
	tr := New().Track(runtime.Container{Name: "c"}).(*tracker)
	p, err := tr.part(out, 1)
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{pid: os.Getpid()}
	send := func(round uint32, final bool) int {
		t.Helper()
		sent := uint64(0)
		for i := 0; i < n; i += 100 {
			m.add(base+uint64(i*checkpoint.PageSize), 100*checkpoint.PageSize)
			k, err := tr.live(p, m, round)
			if err != nil {
				t.Fatal(err)
			}
			sent += k
		}
		if err := out.Round(checkpoint.Round{Number: round, Final: final, Pages: sent}); err != nil {
			t.Fatal(err)
		}
		return int(sent)
	}
	if got := send(0, false); got != n {
		t.Errorf("the first round sent %d pages of %d", got, n)
	}
	if got := send(1, false); got != 0 {
		t.Errorf("nothing was written, %d pages were sent", got)
	}
	page(3)[17]++                 // written
	page(5)[0] = 1                // zero before
	clear(page(6))                // zero now
	page(7)[1] = page(7)[1] ^ 255 // written ...
	page(7)[1] = page(7)[1] ^ 255 // ... and as before again
	for i := 250; i < 270; i++ {
		page(i)[4095] ^= 1
	}
	// What can not be read is left out, what follows is not.
	if err := unix.Mprotect(mem[100*checkpoint.PageSize:110*checkpoint.PageSize], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	page(111)[0] ^= 1
	if got := send(2, true); got != 3+20+1 {
		t.Errorf("the last round sent %d pages", got)
	}
	if err := unix.Mprotect(mem, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	if err := tr.end(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Finish(&checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "c"}}}); err != nil {
		t.Fatal(err)
	}
	sink := &pageSink{pages: map[uint64][]byte{}, round: map[uint32]int{}}
	if _, err := checkpoint.Read(&stream, "s", sink, checkpoint.Limits{}); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if !bytes.Equal(sink.pages[base+uint64(i*checkpoint.PageSize)], page(i)) {
			t.Errorf("page %d is not what is in memory", i)
		}
	}
}

// TestTrackForgets: sums are kept up to a bound; pages beyond it are sent every time.
func TestTrackForgets(t *testing.T) {
	var stream bytes.Buffer
	out, err := checkpoint.NewWriter(&stream, "s")
	if err != nil {
		t.Fatal(err)
	}
	tr := New().Track(runtime.Container{Name: "c"}).(*tracker)
	p, err := tr.part(out, 1)
	if err != nil {
		t.Fatal(err)
	}
	tr.kept.Store(maxKept - 1)
	b := bytes.Repeat([]byte{7}, checkpoint.PageSize)
	for i := range uint64(chunk + 2) {
		for try, want := range []uint64{1, 0} {
			if i >= chunk {
				want = 1
			}
			if n, err := tr.pages(p, 0, (1+i)*checkpoint.PageSize, b, true); n != want || err != nil {
				t.Fatalf("page %d, time %d: %d, %v", i, try, n, err)
			}
		}
	}
	if tr.kept.Load() != maxKept {
		t.Errorf("%d chunks are kept", tr.kept.Load())
	}
	tr.Close()
	if tr.kept.Load() != maxKept-1 {
		t.Errorf("%d chunks are left", tr.kept.Load())
	}
}
