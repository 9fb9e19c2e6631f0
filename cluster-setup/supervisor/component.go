package supervisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses between restarts, like the RestartSec of a unit, growing while a component cannot stay up.
const (
	firstPause   = time.Second
	longestPause = 10 * time.Second
	stableAfter  = 10 * time.Second
	stopGrace    = 10 * time.Second
	probeEvery   = 20 * time.Millisecond
)

// component keeps one program running. Its loop is the only writer of the state.
//
//	waiting --ready--> running --ends--> waiting (after a pause)
//	   ^                  |
//	   +----- start ---- stopped <--- stop
type component struct {
	Component
	processes *processes

	mu     sync.Mutex
	status Status
	cancel context.CancelFunc // Ends the loop; nil when stopped.
	done   chan struct{}      // Closed when the loop has ended.
}

func (c *component) start(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel != nil {
		return
	}
	ctx, c.cancel = context.WithCancel(ctx)
	c.done = make(chan struct{})
	c.status.State = Waiting
	go c.loop(ctx, c.done)
}

// stop ends the program and returns when it is gone.
func (c *component) stop() {
	c.mu.Lock()
	cancel, done := c.cancel, c.done
	c.cancel = nil
	c.mu.Unlock()
	if cancel == nil {
		return
	}
	cancel()
	<-done
}

func (c *component) kill(signal unix.Signal) error {
	c.mu.Lock()
	pid := c.status.PID
	c.mu.Unlock()
	if pid == 0 {
		return fmt.Errorf("%s does not run", c.Name)
	}
	return c.processes.signal(pid, signal, false)
}

func (c *component) report() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

func (c *component) set(change func(*Status)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.status)
}

func (c *component) loop(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	defer c.set(func(s *Status) { s.State, s.PID = Stopped, 0 })
	pause := firstPause
	for {
		if !waitFor(ctx, c.WaitFor) {
			return
		}
		began := time.Now()
		outcome := c.run(ctx)
		if ctx.Err() != nil {
			c.set(func(s *Status) { s.LastExit = outcome })
			return
		}
		c.set(func(s *Status) {
			s.State, s.PID, s.LastExit = Waiting, 0, outcome
			s.Restarts++
		})
		if time.Since(began) > stableAfter {
			pause = firstPause
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

// run starts the program once and returns how it ended.
func (c *component) run(ctx context.Context) string {
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err.Error()
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err.Error()
	}
	defer null.Close()
	pid, ended, err := c.processes.start(command{
		args:  c.Args,
		env:   append(os.Environ(), c.Env...),
		dir:   "/",
		files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
	})
	if err != nil {
		fmt.Fprintln(log, err)
		return err.Error()
	}
	c.set(func(s *Status) { s.State, s.PID = Running, pid })
	select {
	case status := <-ended:
		return describe(status)
	case <-ctx.Done():
	}
	// Only the program itself: what it started, like containerd's shims, must live on, as under systemd's KillMode=process.
	_ = c.processes.signal(pid, unix.SIGTERM, false)
	select {
	case status := <-ended:
		return describe(status)
	case <-time.After(stopGrace):
		_ = c.processes.signal(pid, unix.SIGKILL, false)
		return describe(<-ended)
	}
}

// waitFor returns true when the address accepts connections, false when the context ends first.
func waitFor(ctx context.Context, address string) bool {
	if address == "" {
		return ctx.Err() == nil
	}
	network, address, _ := strings.Cut(address, ":")
	var dialer net.Dialer
	for {
		conn, err := dialer.DialContext(ctx, network, address)
		if err == nil {
			conn.Close()
			return ctx.Err() == nil
		}
		// A socket tells nobody that it has begun to listen.
		select {
		case <-ctx.Done():
			return false
		case <-time.After(probeEvery):
		}
	}
}
