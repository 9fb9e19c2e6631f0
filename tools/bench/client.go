package bench

import (
	"context"
	"net"
	"sync"
	"time"

	"podmig.dev/podmig/cluster-setup/kit"
)

// interval is how often the client asks each address.
const interval = time.Millisecond

// client asks the addresses of a pod over UDP and remembers when answers came.
type client struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	gap *kit.Gap

	mu    sync.Mutex
	asked map[string]bool

	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newClient(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error)) (*client, context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	return &client{dial: dial, gap: kit.NewGap(), asked: make(map[string]bool), cancel: cancel}, ctx
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
	go func() {
		defer c.wg.Done()
		// Ends the reader, too.
		defer conn.Close()
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
				c.gap.Answered()
			} else if ctx.Err() != nil {
				return
			}
		}
	}()
	return nil
}

func (c *client) close() {
	c.cancel()
	c.wg.Wait()
}
