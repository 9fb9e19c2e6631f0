// Command counter counts, in every way whose loss or repetition a move could cause, and tells what it has counted.
//
// A tick increments the number in memory, appends it to a file, sends it to an observer and exchanges it with peers over HTTP and
// through a shared folder; each of these is optional and set by the environment. Peers and the shared folder are checked for gaps
// and repetitions all the time; GET /status shows the result. Standard output gets a line per second, for logs before and after.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// settings come from the environment.
type settings struct {
	name     string        // COUNTER_NAME: how peers and observers know this counter; the host name by default.
	listen   string        // COUNTER_LISTEN: address of the HTTP server.
	tick     time.Duration // COUNTER_TICK: pause between two numbers.
	file     string        // COUNTER_FILE: every number is appended here.
	dir      string        // COUNTER_DIR: folder shared with other counters.
	peers    []string      // COUNTER_PEERS: base addresses of other counters, separated by commas.
	observer string        // COUNTER_OBSERVER: UDP address that gets every number.
}

func read(environment func(string) string) (settings, error) {
	host, err := os.Hostname()
	if err != nil {
		return settings{}, fmt.Errorf("read host name: %w", err)
	}
	get := func(name, otherwise string) string {
		if value := environment(name); value != "" {
			return value
		}
		return otherwise
	}
	s := settings{
		name: get("COUNTER_NAME", host), listen: get("COUNTER_LISTEN", ":8080"), file: get("COUNTER_FILE", ""),
		dir: get("COUNTER_DIR", ""), observer: get("COUNTER_OBSERVER", ""),
	}
	if list := get("COUNTER_PEERS", ""); list != "" {
		s.peers = strings.Split(list, ",")
	}
	if s.tick, err = time.ParseDuration(get("COUNTER_TICK", "100ms")); err != nil || s.tick <= 0 {
		return s, fmt.Errorf("COUNTER_TICK must be a positive duration such as 100ms")
	}
	return s, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "counter:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	s, err := read(os.Getenv)
	if err != nil {
		return err
	}
	c, err := newCounter(s)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	server := &http.Server{Handler: c.handler(), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 2)
	go func() { failed <- server.Serve(listener) }()
	go func() { failed <- c.count(ctx) }()
	for _, peer := range s.peers {
		go c.talk(ctx, peer)
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return server.Close()
	}
}

// handler serves GET /status and the numbers of peers.
func (c *counter) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// A client that goes away is not this program's failure.
		_ = json.NewEncoder(w).Encode(c.status())
	})
	mux.HandleFunc("POST /next", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, c.next())
	})
	mux.HandleFunc("POST /peer", func(w http.ResponseWriter, r *http.Request) {
		var m message
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&m); err != nil {
			http.Error(w, "decode message: "+err.Error(), http.StatusBadRequest)
			return
		}
		c.receive(m)
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}
