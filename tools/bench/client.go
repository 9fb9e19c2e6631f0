package bench

import (
	"context"
	"net"
	"sync"
	"time"
)

// interval is how often the client asks each address.
const interval = time.Millisecond

// client asks the addresses of a pod over UDP and remembers when answers came.
type client struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu sync.Mutex
	// longest time between two answers, and when it ended.
	gap time.Duration
	// last answer; zero until the first.
	last    time.Time
	answers uint64
	asked   map[string]bool
	changed chan struct{}

	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newClient(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error)) (*client, context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	return &client{dial: dial, asked: make(map[string]bool), changed: make(chan struct{}, 1), cancel: cancel}, ctx
}

// ask begins to ask an address; one that is asked already is left as it is.
func (c *client) ask(ctx context.Context, address string) error {
	c.mu.Lock()
	known := c.asked[address]
	c.asked[address] = true
	c.mu.Unlock()
	if known {
		return nil
	}
	conn, err := c.dial(ctx, "udp", address)
	if err != nil {
		return err
	}
	c.wg.Add(2)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	go func() {
		defer c.wg.Done()
		defer stop()
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			// An address that nobody has yet, or any more, is no error.
			_, _ = conn.Write([]byte("?"))
		}
	}()
	go func() {
		defer c.wg.Done()
		buffer := make([]byte, 256)
		for {
			if _, err := conn.Read(buffer); err == nil {
				c.answered(time.Now())
			} else if ctx.Err() != nil {
				return
			}
		}
	}()
	return nil
}

func (c *client) answered(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers++
	if d := now.Sub(c.last); !c.last.IsZero() && d > c.gap {
		c.gap = d
	}
	c.last = now
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// after waits for an answer that came after the given time.
func (c *client) after(ctx context.Context, t time.Time) error {
	for {
		c.mu.Lock()
		ok := c.last.After(t)
		c.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-c.changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// longest returns the longest gap since the last call and forgets it.
func (c *client) longest() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.gap
	c.gap = 0
	return g
}

func (c *client) close() {
	c.cancel()
	c.wg.Wait()
}
