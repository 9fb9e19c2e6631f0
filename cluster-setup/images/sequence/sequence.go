package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// pause between two numbers.
const pause = 2 * time.Millisecond

// series is what came from one sender on one way.
type series struct {
	Last uint64 `json:"last"`
	// Resent counts numbers that were sent again on a new connection because their acknowledgement was lost; they are not
	// taken twice.
	Resent uint64 `json:"resent"`
	Faults uint64 `json:"faults"`
	Fault  string `json:"fault,omitempty"` // The first one.
}

// take takes a number that has to be the next one.
func (s *series) take(n uint64) {
	if n != s.Last+1 {
		s.Faults++
		if s.Fault == "" {
			s.Fault = fmt.Sprintf("%d after %d", n, s.Last)
		}
	}
	s.Last = n
}

// status is what GET /status shows.
type status struct {
	Name     string            `json:"name"`
	PID      int               `json:"pid"`
	Host     string            `json:"host"`
	Started  time.Time         `json:"started"`
	Uptime   time.Duration     `json:"uptime"` // By the monotonic clock.
	Probes   uint64            `json:"probes"`
	Sent     map[string]uint64 `json:"sent"` // Acknowledged ones.
	Wrote    uint64            `json:"wrote"`
	Received map[string]series `json:"received"`
	Read     map[string]series `json:"read"`
}

type program struct {
	settings
	started time.Time

	mu       sync.Mutex
	sick     bool
	probes   uint64
	wrote    uint64
	sent     map[string]uint64
	received map[string]*series
	read     map[string]*series
}

func newProgram(s settings) *program {
	return &program{
		settings: s, started: time.Now(),
		sent: map[string]uint64{}, received: map[string]*series{}, read: map[string]*series{},
	}
}

func (p *program) status() status {
	p.mu.Lock()
	defer p.mu.Unlock()
	host, _ := os.Hostname()
	s := status{
		Name: p.name, PID: os.Getpid(), Host: host, Started: p.started, Uptime: time.Since(p.started), Probes: p.probes, Wrote: p.wrote,
		Sent: map[string]uint64{}, Received: map[string]series{}, Read: map[string]series{},
	}
	for name, n := range p.sent {
		s.Sent[name] = n
	}
	for name, one := range p.received {
		s.Received[name] = *one
	}
	for name, one := range p.read {
		s.Read[name] = *one
	}
	return s
}

func (p *program) probed() (healthy bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.probes++
	return !p.sick
}

func (p *program) becomeSick() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sick = true
}

// accept takes the others' numbers.
func (p *program) accept(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer conn.Close()
			p.receive(conn)
		}()
	}
}

func (p *program) receive(conn net.Conn) {
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		from, text, _ := strings.Cut(lines.Text(), " ")
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return
		}
		p.mu.Lock()
		s := p.received[from]
		if s == nil {
			s = &series{}
			p.received[from] = s
		}
		// Also the other way round: what was read from a connection before it broke may be handled after what came on the
		// new one.
		if n == s.Last {
			s.Resent++
		} else {
			s.take(n)
		}
		p.mu.Unlock()
		if _, err := fmt.Fprintln(conn, n); err != nil {
			return
		}
	}
}

// send sends numbers to one of the others for as long as the program runs.
func (p *program) send(ctx context.Context, name, address string) {
	n := uint64(1)
	for ctx.Err() == nil {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			n = p.sendOn(ctx, conn, name, n)
			conn.Close()
		}
		time.Sleep(pause)
	}
}

// sendOn sends on one connection until it breaks and returns the number to go on with.
func (p *program) sendOn(ctx context.Context, conn net.Conn, name string, n uint64) uint64 {
	answers := bufio.NewReader(conn)
	for ctx.Err() == nil {
		// The other one may be away without a word.
		if conn.SetDeadline(time.Now().Add(5*time.Second)) != nil {
			return n
		}
		if _, err := fmt.Fprintf(conn, "%s %d\n", p.name, n); err != nil {
			return n
		}
		answer, err := answers.ReadString('\n')
		if err != nil || strings.TrimSpace(answer) != strconv.FormatUint(n, 10) {
			return n
		}
		p.mu.Lock()
		p.sent[name] = n
		p.mu.Unlock()
		n++
		time.Sleep(pause)
	}
	return n
}

func (p *program) file(name string) string { return filepath.Join(p.dir, name+".numbers") }

// write appends the own numbers to a file that stays open.
func (p *program) write(ctx context.Context) error {
	f, err := os.OpenFile(p.file(p.name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	for n := uint64(1); ctx.Err() == nil; n++ {
		if _, err := fmt.Fprintln(f, n); err != nil {
			return fmt.Errorf("write number %d: %w", n, err)
		}
		p.mu.Lock()
		p.wrote = n
		p.mu.Unlock()
		time.Sleep(pause)
	}
	return nil
}

// follow reads the file of one of the others as it grows.
func (p *program) follow(ctx context.Context, name string) error {
	var f *os.File
	for {
		var err error
		if f, err = os.Open(p.file(name)); err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) || ctx.Err() != nil {
			return err
		}
		time.Sleep(pause)
	}
	defer f.Close()
	s := &series{}
	p.mu.Lock()
	p.read[name] = s
	p.mu.Unlock()
	in, line := bufio.NewReader(f), ""
	for ctx.Err() == nil {
		part, err := in.ReadString('\n')
		line += part
		if errors.Is(err, io.EOF) {
			time.Sleep(pause)
			continue
		} else if err != nil {
			return fmt.Errorf("read the numbers of %s: %w", name, err)
		}
		n, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64)
		if err != nil {
			return fmt.Errorf("read the numbers of %s: %w", name, err)
		}
		line = ""
		p.mu.Lock()
		s.take(n)
		p.mu.Unlock()
	}
	return nil
}
