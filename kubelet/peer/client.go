package peer

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"time"

	"podmig.dev/podmig/kubelet/wire"
)

// ClientConfig says how to reach a kubelet.
type ClientConfig struct {
	// Address is host:port of the peer's kubelet.
	Address string
	// TLS has the cluster's CA, this node's certificate and the peer's server name.
	// InsecureSkipVerify is refused.
	TLS *tls.Config
	// Stall bounds every wait for the next byte of a stream; 30 s by default.
	Stall time.Duration
}

// Client asks one kubelet.
type Client struct {
	http  *http.Client
	base  string
	stall time.Duration
}

// NewClient returns a client; Close releases its connections.
func NewClient(cfg ClientConfig) (*Client, error) {
	return nil, fmt.Errorf("peer client for %s: not ready", cfg.Address)
}

// Received is a checkpoint on its way in. Read returns io.EOF only after all of it
// arrived, and io.ErrUnexpectedEOF otherwise. Close it in any case.
type Received struct {
	io.ReadCloser
	Version uint32
}

type api interface {
	Open(ctx context.Context, s wire.Session, r *wire.OpenRequest) (*wire.OpenResponse, error)
	Status(ctx context.Context, s wire.Session) (*wire.StatusResponse, error)
	Stream(ctx context.Context, s wire.Session) (*Received, error)
	Logs(ctx context.Context, s wire.Session) (io.ReadCloser, error)
	Freeze(ctx context.Context, s wire.Session, r *wire.FreezeRequest) (*wire.FreezeResponse, error)
	Commit(ctx context.Context, s wire.Session, r *wire.CommitRequest) (*wire.CommitResponse, error)
	Done(ctx context.Context, s wire.Session, r *wire.DoneRequest) error
	Failed(ctx context.Context, s wire.Session, r *wire.FailureRequest) error
	Abort(ctx context.Context, s wire.Session, r *wire.FailureRequest) error
	Outcome(ctx context.Context, s wire.Session) (*wire.OutcomeResponse, error)
}
