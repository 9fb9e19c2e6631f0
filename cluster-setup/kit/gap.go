package kit

import (
	"context"
	"sync"
	"time"
)

// Gap remembers the longest time between two answers of a pod, whatever asked for
// them. It may be used concurrently; the zero value is not ready, see NewGap.
type Gap struct {
	mu      sync.Mutex
	longest time.Duration
	// last answer; zero until the first.
	last    time.Time
	changed chan struct{}
}

// NewGap returns a Gap without answers.
func NewGap() *Gap { return &Gap{changed: make(chan struct{}, 1)} }

// Answered takes note of an answer that came now.
func (g *Gap) Answered() {
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	if d := now.Sub(g.last); !g.last.IsZero() && d > g.longest {
		g.longest = d
	}
	g.last = now
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// After waits for an answer that came after t. Only one caller may wait at a time.
func (g *Gap) After(ctx context.Context, t time.Time) error {
	for {
		g.mu.Lock()
		ok := g.last.After(t)
		g.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-g.changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Longest returns the longest gap since it was last called.
func (g *Gap) Longest() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := g.longest
	g.longest = 0
	return d
}
