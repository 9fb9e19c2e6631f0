//go:build e2e

package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"podmig.dev/podmig/cluster-setup/cluster"
)

// witnessAddress belongs to the loopback of every node, so numbers never leave it.
const (
	witnessAddress = "192.0.2.1"
	witnessPort    = "9999"
)

// pace is the pause between two numbers.
const pace = 20 * time.Millisecond

// tick is one number that a pod has sent.
type tick struct {
	node   string
	number uint64
	// at is the sender's clock, which is the same on all nodes of one machine.
	at time.Time
}

func (t tick) String() string {
	return fmt.Sprintf("%d on %s at %s", t.number, t.node, t.at.Format("05.000000"))
}

// witness hears every number that a pod sends on any node.
type witness struct {
	sockets []net.PacketConn
	done    sync.WaitGroup

	mu    sync.Mutex
	ticks map[string][]tick // by the counter's name
	news  chan struct{}     // closed at the next tick
}

func newWitness(ctx context.Context, c *cluster.Cluster) (*witness, error) {
	w := &witness{ticks: map[string][]tick{}, news: make(chan struct{})}
	for _, l := range lanes {
		for _, part := range []string{source, target} {
			m, err := c.Machine(l[part])
			if err != nil {
				return nil, err
			}
			s, err := m.ListenPacket(ctx, "udp", net.JoinHostPort(witnessAddress, witnessPort))
			if err != nil {
				w.close()
				return nil, err
			}
			w.sockets = append(w.sockets, s)
			w.done.Go(func() { w.hear(part, s) })
		}
	}
	return w, nil
}

func (w *witness) close() {
	for _, s := range w.sockets {
		s.Close()
	}
	w.done.Wait()
}

func (w *witness) hear(node string, s net.PacketConn) {
	buffer := make([]byte, 1024)
	for {
		n, _, err := s.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		var name string
		var number uint64
		var at int64
		if _, err := fmt.Sscan(string(buffer[:n]), &name, &number, &at); err != nil {
			continue
		}
		w.mu.Lock()
		w.ticks[name] = append(w.ticks[name], tick{node, number, time.Unix(0, at)})
		close(w.news)
		w.news = make(chan struct{})
		w.mu.Unlock()
	}
}

// of returns what a counter has sent so far.
func (w *witness) of(name string) []tick {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.ticks[name])
}

// runs waits until a counter has sent some numbers on a node from now on.
func (w *witness) runs(ctx context.Context, name, node string, count int) error {
	began := time.Now()
	for {
		w.mu.Lock()
		seen := 0
		for _, t := range w.ticks[name] {
			if t.node == node && t.at.After(began) {
				seen++
			}
		}
		news := w.news
		w.mu.Unlock()
		if seen >= count {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return fmt.Errorf("%s does not count on %s: %w; its last numbers: %v", name, node, ctx.Err(), tail(w.of(name), 6))
		}
	}
}

// still makes sure that counters that stand still go on standing still.
func (w *witness) still(ctx context.Context, names []string, how time.Duration) error {
	began := time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(how):
	}
	// A number that was under way at the beginning is none of now.
	for _, name := range names {
		for _, t := range w.of(name) {
			if t.at.After(began.Add(pace)) {
				return fmt.Errorf("%s is to be frozen and counts: %s", name, t)
			}
		}
	}
	return nil
}

func tail[T any](s []T, n int) []T { return s[max(0, len(s)-n):] }

// history is what the numbers of one counter tell.
type history struct {
	// nodes in the order in which it ran on them.
	nodes []string
	// away is the longest time between two numbers.
	away time.Duration
	last tick
}

// check reads the numbers of a counter in the order of time: none lost, none twice,
// and they move from the source to the target once at most. Numbers of two copies that
// run at the same time do not fit.
func (w *witness) check(name string) (history, error) {
	var h history
	ticks := w.of(name)
	slices.SortStableFunc(ticks, func(a, b tick) int { return a.at.Compare(b.at) })
	for i, t := range ticks {
		switch {
		case i == 0:
		case t.number <= h.last.number, t.node == source && h.last.node == target:
			return h, fmt.Errorf("%s runs twice: %s after %s", name, t, h.last)
		case t.number != h.last.number+1:
			return h, fmt.Errorf("%s has lost numbers: %s after %s", name, t, h.last)
		}
		if i > 0 {
			h.away = max(h.away, t.at.Sub(h.last.at))
		}
		if i == 0 || t.node != h.last.node {
			h.nodes = append(h.nodes, t.node)
		}
		h.last = t
	}
	if len(h.nodes) == 0 {
		return h, fmt.Errorf("%s has never counted", name)
	}
	return h, nil
}

func (h history) String() string {
	return fmt.Sprintf("%s, away for %s", strings.Join(h.nodes, " then "), h.away.Round(time.Millisecond))
}
