// Command writer writes all the time to everything that moves with a pod, remembers in its memory what must be there, and compares.
//
// The places are files in the container's writable layer, in a volume, in /dev/shm, one that is mapped, one that was deleted while
// open, files that come and go, and memory itself. GET /verify stops the writing for a moment, reads every place and tells what is
// not as it was written. After a move a place that is older or newer than the memory shows here.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// pause between two writes to a place.
const pause = time.Millisecond

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "writer:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	places, err := open()
	if err != nil {
		return err
	}
	if err := prepareTree("/seed"); err != nil {
		return fmt.Errorf("prepare the tree: %w", err)
	}
	failed := make(chan error, len(places)+1)
	for _, p := range places {
		go func() { failed <- p.run(ctx) }()
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /verify", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// A client that goes away is not this program's failure.
		_ = json.NewEncoder(w).Encode(verify(places))
	})
	server := &http.Server{Addr: ":8080", Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { failed <- server.ListenAndServe() }()
	fmt.Println("writing")
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return server.Close()
	}
}

// report is what GET /verify shows.
type report struct {
	PID    int               `json:"pid"`
	Writes map[string]uint64 `json:"writes"`
	Faults []string          `json:"faults"`
}

// verify compares all places at one instant.
func verify(places []*place) report {
	r := report{PID: os.Getpid(), Writes: map[string]uint64{}, Faults: []string{}}
	for _, p := range places {
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	for _, p := range places {
		r.Writes[p.name] = p.writes
		if err := p.compare(); err != nil {
			r.Faults = append(r.Faults, fmt.Sprintf("%s: %v", p.name, err))
		}
	}
	if err := compareTree("/seed"); err != nil {
		r.Faults = append(r.Faults, fmt.Sprintf("tree: %v", err))
	}
	return r
}
