package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// message is a number on its way to a peer.
type message struct {
	From   string `json:"from"`
	Number uint64 `json:"number"`
}

// series follows the numbers of one sender. Number n is expected after n-1; n again is what a sender repeats when the answer to it
// was lost, and is no fault.
type series struct {
	Last     uint64 `json:"last"`
	Received uint64 `json:"received"`
	Resent   uint64 `json:"resent"`
	Faults   uint64 `json:"faults"`
	Fault    string `json:"fault,omitempty"` // The first one.
}

func (s *series) receive(number uint64) {
	switch {
	case s.Received > 0 && number == s.Last:
		s.Resent++
		return
	case s.Received > 0 && number != s.Last+1:
		s.Faults++
		if s.Fault == "" {
			s.Fault = fmt.Sprintf("%d after %d", number, s.Last)
		}
	}
	s.Received++
	s.Last = number
}

// status is what GET /status shows.
type status struct {
	Name     string            `json:"name"`
	PID      int               `json:"pid"`
	Started  time.Time         `json:"started"`
	Ticks    uint64            `json:"ticks"`
	Sequence uint64            `json:"sequence"` // Of POST /next.
	Peers    map[string]series `json:"peers,omitempty"`
	Files    map[string]series `json:"files,omitempty"`
	Sent     map[string]uint64 `json:"sent,omitempty"`
	// Longest is the longest time between two ticks, by the wall clock: a move shows here.
	Longest time.Duration `json:"longestNanoseconds"`
}

type counter struct {
	settings
	started time.Time
	numbers *os.File
	socket  net.PacketConn
	target  net.Addr

	mu       sync.Mutex
	ticks    uint64
	sequence uint64
	longest  time.Duration
	peers    map[string]*series
	files    map[string]*series
	sent     map[string]uint64
}

func newCounter(s settings) (*counter, error) {
	c := &counter{
		settings: s, started: time.Now(),
		peers: map[string]*series{}, files: map[string]*series{}, sent: map[string]uint64{},
	}
	var err error
	if s.file != "" {
		if c.numbers, err = os.OpenFile(s.file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
			return nil, fmt.Errorf("open file of numbers: %w", err)
		}
	}
	if s.observer != "" {
		if c.target, err = net.ResolveUDPAddr("udp", s.observer); err != nil {
			return nil, fmt.Errorf("find observer: %w", err)
		}
		// Not connected: it must go on working under another address.
		if c.socket, err = net.ListenPacket("udp", ":0"); err != nil {
			return nil, fmt.Errorf("open socket to observer: %w", err)
		}
	}
	return c, nil
}

func (c *counter) status() status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := status{
		Name: c.name, PID: os.Getpid(), Started: c.started, Ticks: c.ticks, Sequence: c.sequence, Longest: c.longest,
		Peers: map[string]series{}, Files: map[string]series{}, Sent: map[string]uint64{},
	}
	for name, one := range c.peers {
		s.Peers[name] = *one
	}
	for name, one := range c.files {
		s.Files[name] = *one
	}
	for name, one := range c.sent {
		s.Sent[name] = one
	}
	return s
}

func (c *counter) next() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sequence++
	return c.sequence
}

func (c *counter) receive(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	note(c.peers, m.From, m.Number)
}

func note(all map[string]*series, from string, number uint64) {
	if all[from] == nil {
		all[from] = &series{}
	}
	all[from].receive(number)
}

// count ticks until the context ends or a number cannot be written.
func (c *counter) count(ctx context.Context) error {
	ticker := time.NewTicker(c.tick)
	defer ticker.Stop()
	// Without the monotonic part: that clock stands still while a process is being moved.
	last, printed := time.Now().Round(0), time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := time.Now().Round(0)
		c.mu.Lock()
		c.ticks++
		number := c.ticks
		c.longest = max(c.longest, now.Sub(last))
		c.mu.Unlock()
		last = now
		if err := c.publish(number, now); err != nil {
			return err
		}
		if now.Sub(printed) >= time.Second {
			printed = now
			fmt.Printf("tick %d at %s\n", number, now.UTC().Format(time.RFC3339Nano))
		}
	}
}

func (c *counter) publish(number uint64, now time.Time) error {
	if c.numbers != nil {
		if _, err := fmt.Fprintln(c.numbers, number); err != nil {
			return fmt.Errorf("write number: %w", err)
		}
	}
	if c.socket != nil {
		// The network may be away for a moment; the observer sees that by itself.
		_, _ = c.socket.WriteTo(fmt.Appendf(nil, "%s %d %d\n", c.name, number, now.UnixNano()), c.target)
	}
	if c.dir != "" {
		return c.share(number)
	}
	return nil
}

// share writes the own number into the shared folder and checks the others': theirs never go back.
func (c *counter) share(number uint64) error {
	own := filepath.Join(c.dir, c.name+".number")
	if err := os.WriteFile(own+".new", strconv.AppendUint(nil, number, 10), 0o644); err != nil {
		return fmt.Errorf("share number: %w", err)
	}
	if err := os.Rename(own+".new", own); err != nil {
		return fmt.Errorf("share number: %w", err)
	}
	found, err := filepath.Glob(filepath.Join(c.dir, "*.number"))
	if err != nil {
		return fmt.Errorf("read shared numbers: %w", err)
	}
	for _, path := range found {
		content, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read shared number: %w", err)
		}
		theirs, err := strconv.ParseUint(string(content), 10, 64)
		if err != nil {
			return fmt.Errorf("read shared number of %s: %w", path, err)
		}
		c.mu.Lock()
		name := strings.TrimSuffix(filepath.Base(path), ".number")
		if c.files[name] == nil {
			c.files[name] = &series{}
		}
		c.files[name].observe(theirs)
		c.mu.Unlock()
	}
	return nil
}

// observe follows numbers that are looked at now and then: they may stay or leap, but not go back.
func (s *series) observe(number uint64) {
	if s.Received > 0 && number < s.Last {
		s.Faults++
		if s.Fault == "" {
			s.Fault = fmt.Sprintf("%d after %d", number, s.Last)
		}
	}
	s.Received++
	s.Last = number
}

// talk sends numbers to a peer, each until it has been acknowledged.
func (c *counter) talk(ctx context.Context, peer string) {
	client := &http.Client{Timeout: time.Second}
	for number := uint64(1); ctx.Err() == nil; {
		if c.send(ctx, client, peer, number) {
			c.mu.Lock()
			c.sent[peer] = number
			c.mu.Unlock()
			number++
		}
		select {
		case <-ctx.Done():
		case <-time.After(c.tick):
		}
	}
}

func (c *counter) send(ctx context.Context, client *http.Client, peer string, number uint64) bool {
	body, err := json.Marshal(message{From: c.name, Number: number})
	if err != nil {
		return false
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(peer, "/")+"/peer", bytes.NewReader(body))
	if err != nil {
		return false
	}
	answer, err := client.Do(request)
	if err != nil {
		return false
	}
	defer answer.Body.Close()
	return answer.StatusCode == http.StatusNoContent
}
