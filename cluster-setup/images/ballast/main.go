// Command ballast holds a given amount of memory that cannot be compressed or shared, writes to it at a given rate, and answers
// pings, so that a client outside can measure how long a move makes it wait.
//
// BALLAST_MB is the amount, BALLAST_DIRTY_MB_PER_SECOND the rate, BALLAST_LISTEN the address for HTTP and for UDP. A UDP datagram
// comes back with a running number and the process's wall clock appended. GET /ready answers once the memory is filled, GET /check
// reads all of it and compares it with what was written.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "ballast:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	megabytes, err := number("BALLAST_MB", 0)
	if err != nil {
		return err
	}
	rate, err := number("BALLAST_DIRTY_MB_PER_SECOND", 0)
	if err != nil {
		return err
	}
	address := os.Getenv("BALLAST_LISTEN")
	if address == "" {
		address = ":8080"
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	socket, err := net.ListenPacket("udp", address)
	if err != nil {
		return fmt.Errorf("listen for pings: %w", err)
	}
	m, err := newMemory(megabytes << 20)
	if err != nil {
		return err
	}
	var ready atomic.Bool
	server := &http.Server{Handler: handler(m, &ready), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 2)
	go func() { failed <- server.Serve(listener) }()
	go func() { failed <- answerPings(socket) }()
	m.fill()
	ready.Store(true)
	fmt.Printf("holding %d MB, writing %d MB/s\n", megabytes, rate)
	if rate > 0 && megabytes > 0 {
		go m.dirty(ctx, rate<<20)
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return errors.Join(server.Close(), socket.Close())
	}
}

func number(name string, otherwise int) (int, error) {
	text := os.Getenv(name)
	if text == "" {
		return otherwise, nil
	}
	value, err := strconv.Atoi(text)
	if err != nil || value < 0 {
		return 0, fmt.Errorf("%s must be a number of megabytes, not %q", name, text)
	}
	return value, nil
}

func handler(m *memory, ready *atomic.Bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ping", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, time.Now().UnixNano())
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "filling", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("GET /check", func(w http.ResponseWriter, _ *http.Request) {
		if err := m.check(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "%d bytes as written, %d writes since\n", len(m.bytes), m.writes.Load())
	})
	return mux
}

// answerPings returns every datagram with a running number: the number going on shows that the process did.
func answerPings(socket net.PacketConn) error {
	buffer := make([]byte, 2048)
	for count := uint64(1); ; count++ {
		n, from, err := socket.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ping: %w", err)
		}
		reply := fmt.Appendf(buffer[:n:n], " %d %d", count, time.Now().UnixNano())
		// An answer that cannot be sent is a ping that was lost: the client counts it.
		_, _ = socket.WriteTo(reply, from)
	}
}
