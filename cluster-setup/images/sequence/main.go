// Command sequence exchanges numbers with the other containers of its pod and notices every number that is missing or comes twice.
//
// Each program sends 1, 2, 3... to every other one over TCP, the next number only after the last one was acknowledged, and the same
// one again on a new connection when the old one broke; the receiver takes each number once. It also appends the numbers to a file in
// a shared folder and follows the files of the others with the same descriptor all the time. GET /status tells what it has seen.
// The subcommands do in init containers, hooks and exec sessions what a shell would do, for the image has none.
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
	name   string            // SEQUENCE_NAME
	listen string            // SEQUENCE_LISTEN: where the others send their numbers.
	status string            // SEQUENCE_STATUS: address of the HTTP server.
	dir    string            // SEQUENCE_DIR: the shared folder.
	peers  map[string]string // SEQUENCE_PEERS: name=address of the others, separated by commas.
	failed string            // SEQUENCE_FAILED: a file; while it does not exist, the program makes it and fails.
}

func read() (settings, error) {
	s := settings{
		name: os.Getenv("SEQUENCE_NAME"), listen: os.Getenv("SEQUENCE_LISTEN"), status: os.Getenv("SEQUENCE_STATUS"),
		dir: os.Getenv("SEQUENCE_DIR"), failed: os.Getenv("SEQUENCE_FAILED"), peers: map[string]string{},
	}
	for one := range strings.SplitSeq(os.Getenv("SEQUENCE_PEERS"), ",") {
		name, address, ok := strings.Cut(one, "=")
		if !ok {
			return s, fmt.Errorf("SEQUENCE_PEERS has %q, which is not name=address", one)
		}
		s.peers[name] = address
	}
	if s.name == "" || s.listen == "" || s.status == "" || s.dir == "" {
		return s, fmt.Errorf("SEQUENCE_NAME, SEQUENCE_LISTEN, SEQUENCE_STATUS and SEQUENCE_DIR have to be set")
	}
	return s, nil
}

func main() {
	if err := command(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sequence:", err)
		os.Exit(1)
	}
}

func command(args []string) error {
	switch {
	case len(args) == 0:
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		return serve(ctx)
	case len(args) == 3 && args[0] == "append":
		return appendLine(args[1], args[2])
	case len(args) == 2 && args[0] == "print":
		b, err := os.ReadFile(args[1])
		if err == nil {
			_, err = os.Stdout.Write(b)
		}
		return err
	case len(args) == 2 && args[0] == "environment":
		fmt.Println(os.Getenv(args[1]))
		return nil
	}
	return fmt.Errorf("unknown arguments %q: append FILE LINE, print FILE, environment NAME, or none to serve", args)
}

func appendLine(path, line string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(f, line); err != nil {
		return err
	}
	return f.Close()
}

func serve(ctx context.Context) error {
	s, err := read()
	if err != nil {
		return err
	}
	if s.failed != "" {
		if _, err := os.Stat(s.failed); err != nil {
			if err := appendLine(s.failed, s.name); err != nil {
				return err
			}
			return fmt.Errorf("failing once, as %s tells", s.failed)
		}
	}
	p := newProgram(s)
	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		return fmt.Errorf("listen for numbers: %w", err)
	}
	failed := make(chan error, 3+len(s.peers))
	go func() { failed <- p.accept(listener) }()
	go func() { failed <- p.write(ctx) }()
	for name, address := range s.peers {
		go p.send(ctx, name, address)
		go func() { failed <- p.follow(ctx, name) }()
	}
	server := &http.Server{Addr: s.status, Handler: p.handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() { failed <- server.ListenAndServe() }()
	fmt.Println("exchanging numbers as", s.name)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return server.Close()
	}
}

// handler serves GET /status, GET /healthz for probes and POST /sick, after which the probes fail.
func (p *program) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// A client that goes away is not this program's failure.
		_ = json.NewEncoder(w).Encode(p.status())
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !p.probed() {
			http.Error(w, "sick", http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("POST /sick", func(http.ResponseWriter, *http.Request) { p.becomeSick() })
	return mux
}
