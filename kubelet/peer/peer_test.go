package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	"k8s.io/klog/v2"

	"podmig.dev/podmig/kubelet/wire"
	"podmig.dev/podmig/kubelet/wire/wiretest"
)

// sessions puts the suite's fake behind the server.
type sessions struct{ f *wiretest.Fake }

func fake[A any](ctx context.Context, s sessions, c Call, body any) (*A, error) {
	a, err := s.f.Serve(ctx.Done(), wiretest.Request{Verb: c.Verb, Session: c.Session, User: c.Caller.User, Node: c.Caller.Node, Body: body})
	if err != nil {
		return nil, err
	}
	answer, _ := a.(*A)
	return answer, nil
}

func (s sessions) Open(ctx context.Context, c Call, r *wire.OpenRequest) (*wire.OpenResponse, error) {
	return fake[wire.OpenResponse](ctx, s, c, r)
}
func (s sessions) Status(ctx context.Context, c Call) (*wire.StatusResponse, error) {
	return fake[wire.StatusResponse](ctx, s, c, nil)
}
func (s sessions) Freeze(ctx context.Context, c Call, r *wire.FreezeRequest) (*wire.FreezeResponse, error) {
	return fake[wire.FreezeResponse](ctx, s, c, r)
}
func (s sessions) Commit(ctx context.Context, c Call, r *wire.CommitRequest) (*wire.CommitResponse, error) {
	return fake[wire.CommitResponse](ctx, s, c, r)
}
func (s sessions) Done(ctx context.Context, c Call, r *wire.DoneRequest) error {
	_, err := fake[wire.Empty](ctx, s, c, r)
	return err
}
func (s sessions) Failed(ctx context.Context, c Call, r *wire.FailureRequest) error {
	_, err := fake[wire.Empty](ctx, s, c, r)
	return err
}
func (s sessions) Abort(ctx context.Context, c Call, r *wire.FailureRequest) error {
	_, err := fake[wire.Empty](ctx, s, c, r)
	return err
}
func (s sessions) Outcome(ctx context.Context, c Call) (*wire.OutcomeResponse, error) {
	return fake[wire.OutcomeResponse](ctx, s, c, nil)
}
func (s sessions) Stream(ctx context.Context, c Call) (*Stream, error) {
	if _, err := fake[wire.Empty](ctx, s, c, nil); err != nil {
		return nil, err
	}
	body, ok := s.f.Checkpoint.(io.ReadCloser)
	if !ok {
		body = io.NopCloser(s.f.Checkpoint)
	}
	return &Stream{Version: wiretest.StreamVersion, Body: body,
		Sent: func(n uint64, err error) { s.f.Sent <- wiretest.SentStream{Bytes: n, Err: err} }}, nil
}

func quiet() context.Context { return klog.NewContext(context.Background(), logr.Discard()) }

func TestServer(t *testing.T) {
	wiretest.Server(t,
		func(f *wiretest.Fake) http.Handler { return NewServer(quiet(), sessions{f}, wiretest.Identify) },
		func(f *wiretest.Fake) http.Handler {
			s := NewServer(quiet(), sessions{f}, wiretest.Identify)
			s.Limit(Limits{PerCaller: 2, Stall: 200 * time.Millisecond})
			return s
		})
}

// client shows the suite a Client as it wants to see one.
type client struct{ *Client }

func (c client) Ask(ctx context.Context, v wire.Verb, s wire.Session, body any) (any, error) {
	switch v {
	case wire.VerbOpen:
		return c.Open(ctx, s, body.(*wire.OpenRequest))
	case wire.VerbStatus:
		return c.Status(ctx, s)
	case wire.VerbFreeze:
		return c.Freeze(ctx, s, body.(*wire.FreezeRequest))
	case wire.VerbCommit:
		return c.Commit(ctx, s, body.(*wire.CommitRequest))
	case wire.VerbDone:
		return nil, c.Done(ctx, s, body.(*wire.DoneRequest))
	case wire.VerbFailed:
		return nil, c.Failed(ctx, s, body.(*wire.FailureRequest))
	case wire.VerbAbort:
		return nil, c.Abort(ctx, s, body.(*wire.FailureRequest))
	case wire.VerbOutcome:
		return c.Outcome(ctx, s)
	}
	return nil, fmt.Errorf("no method for %s", v)
}

func (c client) Stream(ctx context.Context, s wire.Session) (uint32, io.ReadCloser, error) {
	r, err := c.Client.Stream(ctx, s)
	if err != nil {
		return 0, nil, err
	}
	return r.Version, r, nil
}

func TestClient(t *testing.T) {
	wiretest.Clients(t, func(address, node string, cfg *tls.Config) (wiretest.Client, error) {
		c, err := NewClient(ClientConfig{Address: address, Node: node, TLS: cfg, Stall: 200 * time.Millisecond})
		if err != nil {
			return nil, err
		}
		t.Cleanup(c.Close)
		return client{c}, nil
	}, func(err error) wiretest.Kind { return wiretest.Kind(VerdictOf(err)) })
}

// TestTogether: the client understands the server, over one connection each.
func TestTogether(t *testing.T) {
	ca, f := wiretest.NewCA(t), wiretest.NewFake()
	size := int64(64 << 20)
	f.Checkpoint = io.LimitReader(zeros{}, size)
	srv := httptest.NewUnstartedServer(NewServer(quiet(), sessions{f}, wiretest.Identify))
	srv.TLS = ca.ServerTLS(ca.Node(t, "n1"))
	srv.EnableHTTP2 = true // as the kubelet does
	srv.StartTLS()
	defer srv.Close()
	c, err := NewClient(ClientConfig{Address: srv.Listener.Addr().String(), Node: "n1", TLS: ca.ClientTLS(ca.Node(t, "n2"))})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s := wiretest.Session
	if _, err := c.Open(ctx, s, wiretest.Bodies[wire.VerbOpen].(*wire.OpenRequest)); err != nil {
		t.Fatal(err)
	}
	r, err := c.Stream(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n, err := io.Copy(io.Discard, r); err != nil || n != size {
		t.Fatalf("%d bytes, error %v", n, err)
	}
	if _, err := c.Freeze(ctx, s, &wire.FreezeRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Commit(ctx, s, &wire.CommitRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Done(ctx, s, &wire.DoneRequest{}); err != nil {
		t.Fatal(err)
	}
	f.Fail[wire.VerbCommit] = wire.Errorf(wire.CodeAborted, "the deadline passed")
	if _, err := c.Commit(ctx, s, &wire.CommitRequest{}); VerdictOf(err) != VerdictRefused || !errors.Is(err, &wire.Error{Code: wire.CodeAborted}) {
		t.Errorf("%v", err)
	}
}

// BenchmarkStream is the most that one checkpoint can get on this machine, both ends
// and the encryption included.
func BenchmarkStream(b *testing.B) {
	const size = 256 << 20
	ca, f := wiretest.NewCA(b), wiretest.NewFake()
	srv := httptest.NewUnstartedServer(NewServer(quiet(), sessions{f}, wiretest.Identify))
	srv.TLS = ca.ServerTLS(ca.Node(b, "n1"))
	srv.StartTLS()
	defer srv.Close()
	c, err := NewClient(ClientConfig{Address: srv.Listener.Addr().String(), Node: "n1", TLS: ca.ClientTLS(ca.Node(b, "n2"))})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.SetBytes(size)
	b.ReportAllocs()
	buf := make([]byte, 1<<20)
	for b.Loop() {
		f.Checkpoint = io.LimitReader(zeros{}, size)
		r, err := c.Stream(context.Background(), wiretest.Session)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, buf)
		if err != nil || n != size {
			b.Fatalf("%d bytes, error %v", n, err)
		}
		_ = r.Close()
		<-f.Sent
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestRefusalsAreLoggedOnce: and counted each time.
func TestRefusalsAreLoggedOnce(t *testing.T) {
	var mu sync.Mutex
	var lines []string
	counted := map[wire.Code]int{}
	log := funcr.New(func(prefix, args string) {
		mu.Lock()
		defer mu.Unlock()
		lines = append(lines, args)
	}, funcr.Options{Verbosity: 2})
	f := wiretest.NewFake()
	h := NewServer(klog.NewContext(context.Background(), log), sessions{f}, func(r *http.Request) (string, bool) {
		return r.Header.Get("User"), true
	})
	h.Refused = func(_ wire.Verb, c wire.Code) { counted[c]++ }
	ask := func(user string, s wire.Session) {
		r := httptest.NewRequest("GET", "https://n1"+s.Path(wire.VerbStatus), nil)
		r.Header.Set("User", user)
		h.ServeHTTP(httptest.NewRecorder(), r)
	}
	guess := wiretest.Session
	guess.ID = "guessed-0000"
	for range 5 {
		ask("system:node:n3", wiretest.Session)
		ask("system:node:n2", guess)
		ask("jane", wiretest.Session)
	}
	if len(lines) != 3 {
		t.Errorf("%d lines: %q", len(lines), lines)
	}
	if counted[wire.CodeForbidden] != 10 || counted[wire.CodeUnknownSession] != 5 {
		t.Errorf("counted %v", counted)
	}
	lines = nil
	for range 5 {
		ask("system:node:n2", wiretest.Session)
	}
	if len(lines) != 5 {
		t.Errorf("%d lines for 5 requests: %q", len(lines), lines)
	}

	// What the kubelet has refused itself, with a port of its own for each request.
	lines = nil
	clear(counted)
	for i := range 5 {
		h.RefusedBefore("", fmt.Sprintf("10.0.0.1:%d", 1000+i), wire.Errorf(wire.CodeUnknownCaller, "the caller is not authenticated"))
		h.RefusedBefore("", fmt.Sprintf("[fd00::1]:%d", 1000+i), wire.Errorf(wire.CodeUnknownCaller, "the caller is not authenticated"))
		h.RefusedBefore("jane", fmt.Sprintf("10.0.0.1:%d", 1000+i), wire.Errorf(wire.CodeForbidden, "the user may not create nodes/migration"))
	}
	if len(lines) != 3 || counted[wire.CodeUnknownCaller] != 10 || counted[wire.CodeForbidden] != 5 {
		t.Errorf("counted %v, %d lines: %q", counted, len(lines), lines)
	}
}

// TestDeadline: a session that does not answer is not waited for.
func TestDeadline(t *testing.T) {
	ca, f := wiretest.NewCA(t), wiretest.NewFake()
	f.Hold[wire.VerbFreeze] = make(chan struct{})
	h := NewServer(quiet(), sessions{f}, wiretest.Identify)
	h.Limit(Limits{Deadline: 50 * time.Millisecond})
	srv := httptest.NewUnstartedServer(h)
	srv.TLS = ca.ServerTLS(ca.Node(t, "n1"))
	srv.StartTLS()
	defer srv.Close()
	c, err := NewClient(ClientConfig{Address: srv.Listener.Addr().String(), TLS: ca.ClientTLS(ca.Node(t, "n2"))})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err = c.Freeze(ctx, wiretest.Session, &wire.FreezeRequest{})
	if VerdictOf(err) != VerdictNoAnswer || wire.CodeOf(err) != wire.CodeDeadline {
		t.Errorf("%v", err)
	}
}

func TestVerdictOf(t *testing.T) {
	for code, want := range map[wire.Code]Verdict{
		wire.CodeUnknownSession: VerdictGone, wire.CodeAborted: VerdictRefused, wire.CodeReturned: VerdictRefused,
		wire.CodeUnavailable: VerdictNoAnswer, wire.CodeInternal: VerdictNoAnswer,
	} {
		if got := VerdictOf(fmt.Errorf("x: %w", wire.Errorf(code, "m"))); got != want {
			t.Errorf("%s is %q, want %q", code, got, want)
		}
	}
	if VerdictOf(nil) != VerdictOK || VerdictOf(io.EOF) != VerdictNoAnswer {
		t.Error("nil or io.EOF")
	}
}
