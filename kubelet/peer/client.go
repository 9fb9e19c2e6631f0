package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strconv"
	"time"

	"podmig.dev/podmig/kubelet/wire"
)

// ClientConfig says how to reach a kubelet.
type ClientConfig struct {
	// Address is host:port of the peer's kubelet.
	Address string
	// Node is the name of the peer's node. If set, the peer's certificate has to be of
	// that node: its common name is the node's user name, or the node's name is one of
	// its names. Any node has a certificate that the cluster's CA has signed.
	Node string
	// TLS has the cluster's CA in RootCAs, this node's certificate, and the peer's
	// server name if that is not the host of Address. InsecureSkipVerify is refused.
	TLS *tls.Config
	// Dial makes connections; net.Dialer with a deadline by default.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Stall bounds every wait for the next byte of a stream; 2 minutes by default.
	Stall time.Duration
}

// Client asks one kubelet. It retries nothing: whether to ask again is the engine's
// decision, and VerdictOf says whether it has to be made. All calls end with their
// context, which has to have a deadline.
type Client struct {
	http      *http.Client
	transport *http.Transport
	address   string
	stall     time.Duration
}

// NewClient returns a client; Close releases its connections.
func NewClient(cfg ClientConfig) (*Client, error) {
	if _, _, err := net.SplitHostPort(cfg.Address); err != nil {
		return nil, fmt.Errorf("migration peer %q: not host:port: %w", cfg.Address, err)
	}
	if cfg.TLS == nil || cfg.TLS.InsecureSkipVerify || cfg.TLS.RootCAs == nil {
		return nil, fmt.Errorf("migration peer %s: the peer's certificate has to be verified against the cluster's CA: give the kubelet a client CA", cfg.Address)
	}
	t := cfg.TLS.Clone()
	// One connection per request in flight: a checkpoint must not share the windows of
	// an HTTP/2 connection with the commit.
	t.NextProtos = []string{"http/1.1"}
	t.MinVersion = max(t.MinVersion, tls.VersionTLS12)
	// The commit may need a connection of its own, and the pod is frozen by then.
	t.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	if cfg.Node != "" {
		before := t.VerifyConnection
		t.VerifyConnection = func(cs tls.ConnectionState) error {
			if before != nil {
				if err := before(cs); err != nil {
					return err
				}
			}
			return isNode(cs.PeerCertificates[0], cfg.Node)
		}
	}
	dial := cfg.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	}
	stall := cfg.Stall
	if stall <= 0 {
		stall = 2 * time.Minute
	}
	tr := &http.Transport{
		DialContext:            dial,
		TLSClientConfig:        t,
		TLSHandshakeTimeout:    5 * time.Second,
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
		DisableCompression:     true,
		MaxIdleConnsPerHost:    4,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize:         256 << 10,
	}
	return &Client{
		http: &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		}},
		transport: tr, address: cfg.Address, stall: stall,
	}, nil
}

// isNode refuses the certificate of another node.
func isNode(cert *x509.Certificate, node string) error {
	if cert.Subject.CommonName == nodePrefix+node || cert.VerifyHostname(node) == nil {
		return nil
	}
	return fmt.Errorf("the certificate of %q is not that of node %q", cert.Subject.CommonName, node)
}

// Close releases idle connections. Calls that run end with their context.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Open authorises, compares and preflights.
func (c *Client) Open(ctx context.Context, s wire.Session, r *wire.OpenRequest) (*wire.OpenResponse, error) {
	return call[wire.OpenResponse](ctx, c, wire.VerbOpen, s, r)
}

// Status asks where the source stands.
func (c *Client) Status(ctx context.Context, s wire.Session) (*wire.StatusResponse, error) {
	return call[wire.StatusResponse](ctx, c, wire.VerbStatus, s, nil)
}

// Freeze freezes the pod; the answer comes when everything was handed to the stream.
func (c *Client) Freeze(ctx context.Context, s wire.Session, r *wire.FreezeRequest) (*wire.FreezeResponse, error) {
	return call[wire.FreezeResponse](ctx, c, wire.VerbFreeze, s, r)
}

// Commit asks for the pod. Only a nil error means that it was given.
func (c *Client) Commit(ctx context.Context, s wire.Session, r *wire.CommitRequest) (*wire.CommitResponse, error) {
	return call[wire.CommitResponse](ctx, c, wire.VerbCommit, s, r)
}

// Done says that the clone runs.
func (c *Client) Done(ctx context.Context, s wire.Session, r *wire.DoneRequest) error {
	_, err := call[wire.Empty](ctx, c, wire.VerbDone, s, r)
	return err
}

// Failed says that no restored process exists.
func (c *Client) Failed(ctx context.Context, s wire.Session, r *wire.FailureRequest) error {
	_, err := call[wire.Empty](ctx, c, wire.VerbFailed, s, r)
	return err
}

// Abort says that the target gives up before the commit.
func (c *Client) Abort(ctx context.Context, s wire.Session, r *wire.FailureRequest) error {
	_, err := call[wire.Empty](ctx, c, wire.VerbAbort, s, r)
	return err
}

// Outcome asks the target's kubelet what became of the clone.
func (c *Client) Outcome(ctx context.Context, s wire.Session) (*wire.OutcomeResponse, error) {
	return call[wire.OutcomeResponse](ctx, c, wire.VerbOutcome, s, nil)
}

// Received is a checkpoint on its way in. Read returns io.EOF only after
// all of it arrived, and io.ErrUnexpectedEOF when it ended before. Close it in any case.
type Received struct {
	// Version is that of the stream.
	Version uint32

	resp   *http.Response
	cancel context.CancelCauseFunc
	ctx    context.Context
	stall  time.Duration
	timer  *time.Timer
	bytes  uint64
	err    error
}

var errStall = errors.New("the peer sent nothing for too long")

// Stream begins to receive the checkpoint.
func (c *Client) Stream(ctx context.Context, s wire.Session) (*Received, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	resp, err := c.do(ctx, wire.VerbStream, s, nil)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	r := &Received{resp: resp, ctx: ctx, cancel: cancel, stall: c.stall}
	r.timer = time.AfterFunc(c.stall, func() { cancel(errStall) })
	r.timer.Stop()
	v, err := strconv.ParseUint(resp.Header.Get(wire.HeaderStreamVersion), 10, 32)
	if got := resp.Header.Get("Content-Type"); got != wire.ContentStream || err != nil || v == 0 {
		_ = r.Close()
		return nil, fmt.Errorf("stream from %s: content type %q, %s %q: not a checkpoint", c.address, got,
			wire.HeaderStreamVersion, resp.Header.Get(wire.HeaderStreamVersion))
	}
	r.Version = uint32(v)
	return r, nil
}

// Read waits at most for the stall deadline. Time in which nobody reads does not count.
func (r *Received) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	r.timer.Reset(r.stall)
	n, err := r.resp.Body.Read(p)
	r.timer.Stop()
	r.bytes += uint64(n)
	switch {
	case err == io.EOF:
		if total, perr := strconv.ParseUint(r.resp.Trailer.Get(wire.TrailerStreamBytes), 10, 64); perr != nil || total != r.bytes {
			err = io.ErrUnexpectedEOF
		}
	case err != nil && context.Cause(r.ctx) != nil:
		err = context.Cause(r.ctx)
	}
	r.err = err
	return n, err
}

// Close ends the stream, whether or not it was complete.
func (r *Received) Close() error {
	r.timer.Stop()
	r.cancel(context.Canceled)
	return r.resp.Body.Close()
}

// call makes one request and decodes the answer.
func call[A any](ctx context.Context, c *Client, v wire.Verb, s wire.Session, body any) (*A, error) {
	resp, err := c.do(ctx, v, s, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var a A
	if err := wire.Decode(resp.Body, &a); err != nil {
		// Not %w: a bad answer is no answer, whatever code the decoder gives it.
		return nil, fmt.Errorf("%s at %s: the answer cannot be read: %v", v, c.address, err)
	}
	return &a, nil
}

// do makes one request; the error is a *wire.Error if and only if the peer answered
// with one, or the request could not be made from what the caller gave.
func (c *Client) do(ctx context.Context, v wire.Verb, s wire.Session, body any) (*http.Response, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	var rd io.Reader
	if body != nil {
		if val, ok := body.(wire.Validator); ok {
			if err := val.Validate(); err != nil {
				return nil, err
			}
		}
		b, err := wire.Encode(body)
		if err != nil {
			return nil, err
		}
		rd = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, v.Method(), "https://"+c.address+s.Path(v), rd)
	if err != nil {
		return nil, fmt.Errorf("%s at %s: %w", v, c.address, err)
	}
	if rd != nil {
		req.Header.Set("Content-Type", wire.ContentJSON)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", v, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, c.refused(v, resp)
}

// refused makes an error of an answer that is not a yes.
func (c *Client) refused(v wire.Verb, resp *http.Response) error {
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil && t == wire.ContentJSON {
		var e wire.Error
		if err := wire.Decode(resp.Body, &e); err == nil && e.Code.HTTPStatus() == resp.StatusCode {
			return &e
		}
	}
	// Not a migration server's answer: the kubelet's own authentication, authorisation
	// or multiplexer.
	e := &wire.Error{Details: map[string]string{"status": strconv.Itoa(resp.StatusCode)}}
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		e.Code, e.Message = wire.CodeUnknownCaller, "the kubelet at "+c.address+" does not accept this node's certificate"
		e.Cure = "both kubelets have to be members of one cluster; check the client CA of the peer"
	case http.StatusForbidden:
		e.Code, e.Message = wire.CodeForbidden, "the kubelet at "+c.address+" does not allow this node nodes/migration"
		e.Cure = "grant the group system:nodes the resource nodes/migration"
	case http.StatusNotFound:
		e.Code, e.Message = wire.CodeDisabled, "the kubelet at "+c.address+" does not serve migrations"
		e.Cure = "run a kubelet with podmig there and switch the feature gate PodMigration on"
	default:
		return fmt.Errorf("%s at %s: unexpected status %s", v, c.address, resp.Status)
	}
	return e
}
