package wiretest

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"podmig.dev/podmig/kubelet/wire"
)

// wait bounds everything that the suite waits for.
const wait = 20 * time.Second

// Identify is the authentication in front of the server under test: the common name
// of a verified client certificate.
func Identify(r *http.Request) (string, bool) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return "", false
	}
	return r.TLS.VerifiedChains[0][0].Subject.CommonName, true
}

// bench is a server under test with what it needs to be asked.
type bench struct {
	t    *testing.T
	ca   *CA
	fake *Fake
	srv  *httptest.Server
	node *http.Client // node n2
}

func newBench(t *testing.T, handler func(*Fake) http.Handler) *bench {
	b := &bench{t: t, ca: NewCA(t), fake: NewFake()}
	b.srv = httptest.NewUnstartedServer(handler(b.fake))
	b.srv.TLS = b.ca.ServerTLS(b.ca.Node(t, "n1"))
	b.srv.StartTLS()
	t.Cleanup(b.srv.Close)
	b.node = b.as(b.ca.Node(t, "n2"))
	return b
}

func (b *bench) as(certs ...tls.Certificate) *http.Client {
	cfg := &tls.Config{RootCAs: b.ca.Pool(), Certificates: certs}
	tr := &http.Transport{TLSClientConfig: cfg}
	b.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: wait}
}

// ask makes a request with the body that belongs to the verb.
func (b *bench) ask(c *http.Client, v wire.Verb, s wire.Session, change func(*http.Request)) *http.Response {
	b.t.Helper()
	var body io.Reader
	if v := Bodies[v]; v != nil {
		enc, err := wire.Encode(v)
		if err != nil {
			b.t.Fatal(err)
		}
		body = bytes.NewReader(enc)
	}
	req, err := http.NewRequest(v.Method(), b.srv.URL+s.Path(v), body)
	if err != nil {
		b.t.Fatal(err)
	}
	if body != nil {
		req.Header.Set("Content-Type", wire.ContentJSON)
	}
	if change != nil {
		change(req)
	}
	resp, err := c.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

// wantError checks status, type, shape and code of a refusal.
func wantError(t *testing.T, resp *http.Response, want wire.Code) *wire.Error {
	t.Helper()
	var e wire.Error
	if err := wire.Decode(resp.Body, &e); err != nil {
		t.Fatalf("status %s: not an error body: %v", resp.Status, err)
	}
	if e.Code != want || resp.StatusCode != want.HTTPStatus() || resp.Header.Get("Content-Type") != wire.ContentJSON {
		t.Errorf("got %s, %s, %+v; want code %s", resp.Status, resp.Header.Get("Content-Type"), e, want)
	}
	if e.Message == "" {
		t.Error("the error says nothing")
	}
	return &e
}

// Server checks a server. handler returns a new one in front of a fake, which it
// asks with Fake.Serve; limit, if not nil, makes the server refuse a third request at
// the same time and wait at most 200 ms for a reader of a stream.
func Server(t *testing.T, handler func(*Fake) http.Handler, limited func(*Fake) http.Handler) {
	t.Run("every verb", func(t *testing.T) { everyVerb(t, newBench(t, handler)) })
	t.Run("stream", func(t *testing.T) { stream(t, newBench(t, handler)) })
	t.Run("broken stream", func(t *testing.T) { brokenStream(t, newBench(t, handler)) })
	t.Run("errors", func(t *testing.T) { errorsOfSessions(t, newBench(t, handler)) })
	t.Run("bad requests", func(t *testing.T) { badRequests(t, newBench(t, handler)) })
	t.Run("attacks", func(t *testing.T) { attacks(t, newBench(t, handler), handler) })
	t.Run("caller goes away", func(t *testing.T) { callerGoesAway(t, newBench(t, handler)) })
	t.Run("limits", func(t *testing.T) { limits(t, newBench(t, limited)) })
}

func everyVerb(t *testing.T, b *bench) {
	for _, v := range wire.Verbs() {
		if v == wire.VerbStream {
			continue
		}
		for range 2 { // The second time it is a repetition, which is the sessions' matter.
			resp := b.ask(b.node, v, Session, nil)
			got := reflect.New(reflect.TypeOf(Answers[v]).Elem()).Interface()
			if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != wire.ContentJSON {
				t.Errorf("%s: %s, %s", v, resp.Status, resp.Header.Get("Content-Type"))
			}
			if err := wire.Decode(resp.Body, got); err != nil || !reflect.DeepEqual(got, Answers[v]) {
				t.Errorf("%s: answer %+v, error %v", v, got, err)
			}
			all := b.fake.Requests()
			last := all[len(all)-1]
			if last.Verb != v || last.Session != Session || last.User != "system:node:n2" || last.Node != "n2" {
				t.Errorf("%s: the sessions were asked %+v", v, last)
			}
			if Bodies[v] != nil && !reflect.DeepEqual(last.Body, Bodies[v]) {
				t.Errorf("%s: the sessions got the body %+v", v, last.Body)
			}
		}
	}
}

func stream(t *testing.T, b *bench) {
	// A part that comes late must not hold back what came before.
	r, w := io.Pipe()
	b.fake.Checkpoint = r
	resp := b.ask(b.node, wire.VerbStream, Session, nil)
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != wire.ContentStream ||
		resp.Header.Get(wire.HeaderStreamVersion) != fmt.Sprint(StreamVersion) {
		t.Fatalf("%s, header %v", resp.Status, resp.Header)
	}
	for _, part := range []string{"first round", strings.Repeat("second round", 100000)} {
		go func() { _, _ = io.WriteString(w, part) }()
		got := make([]byte, len(part))
		if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != part {
			t.Fatalf("part of %d bytes did not come through: %v", len(part), err)
		}
	}
	_ = w.Close()
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) != 0 {
		t.Fatalf("%d more bytes, error %v", len(rest), err)
	}
	want := uint64(len("first round") + 100000*len("second round"))
	if got := resp.Trailer.Get(wire.TrailerStreamBytes); got != fmt.Sprint(want) {
		t.Errorf("trailer %q, want %d", got, want)
	}
	if sent := next(t, b.fake.Sent); sent.Err != nil || sent.Bytes != want {
		t.Errorf("the sessions were told %+v", sent)
	}
}

func brokenStream(t *testing.T, b *bench) {
	b.fake.Checkpoint = io.MultiReader(strings.NewReader("part"), errReader{})
	resp := b.ask(b.node, wire.VerbStream, Session, nil)
	got, err := io.ReadAll(resp.Body)
	if err == nil && resp.Trailer.Get(wire.TrailerStreamBytes) != "" {
		t.Errorf("a broken stream looks whole: %q, trailer %v", got, resp.Trailer)
	}
	if sent := next(t, b.fake.Sent); sent.Err == nil {
		t.Error("the sessions were told that all was sent")
	}
	b.fake.Fail[wire.VerbStream] = wire.Errorf(wire.CodeWrongState, "not now")
	wantError(t, b.ask(b.node, wire.VerbStream, Session, nil), wire.CodeWrongState)
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("CRIU died") }

func errorsOfSessions(t *testing.T, b *bench) {
	fd := int32(3)
	for _, code := range wire.Codes() {
		want := &wire.Error{Code: code, Message: "because", Cure: "do that", Details: map[string]string{"a": "b"},
			Findings: []wire.Finding{{Severity: wire.SeverityBlocking, Code: "IOUring", FD: &fd, Message: "m"}}}
		b.fake.Fail[wire.VerbOpen] = fmt.Errorf("wrapped: %w", want)
		if got := wantError(t, b.ask(b.node, wire.VerbOpen, Session, nil), code); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v", code, got)
		}
	}
	b.fake.Fail[wire.VerbOpen] = errors.New("something else")
	wantError(t, b.ask(b.node, wire.VerbOpen, Session, nil), wire.CodeInternal)
	b.fake.Fail[wire.VerbOpen] = wire.Errorf(wire.CodeRuntime, "%s", strings.Repeat("long ", wire.MaxBody))
	resp := b.ask(b.node, wire.VerbOpen, Session, nil)
	wantError(t, resp, wire.CodeRuntime)
}

func badRequests(t *testing.T, b *bench) {
	body := func(s string) func(*http.Request) {
		return func(r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(s)), int64(len(s))
		}
	}
	path := func(f func(string) string) func(*http.Request) {
		return func(r *http.Request) { r.URL.Path = f(r.URL.Path) }
	}
	for _, tc := range []struct {
		name   string
		verb   wire.Verb
		change func(*http.Request)
		want   wire.Code
	}{
		{"not JSON", wire.VerbDone, body("resumedAt=1"), wire.CodeBadRequest},
		{"no body", wire.VerbDone, body(""), wire.CodeBadRequest},
		{"unknown field", wire.VerbDone, body(`{"soul":1}`), wire.CodeBadRequest},
		{"field twice", wire.VerbDone, body(`{"resumedAt":1,"resumedAt":2}`), wire.CodeBadRequest},
		{"two bodies", wire.VerbDone, body(`{}{}`), wire.CodeBadRequest},
		{"invalid body", wire.VerbFailed, body(`{"reason":"not a word","message":""}`), wire.CodeBadRequest},
		{"large body", wire.VerbDone, body(`{"resumedAt":` + strings.Repeat(" ", wire.MaxBody) + `1}`), wire.CodeTooLarge},
		{"body of unknown length, large", wire.VerbDone, func(r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(strings.Repeat(" ", 2*wire.MaxBody))), -1
		}, wire.CodeTooLarge},
		{"body where none belongs", wire.VerbStatus, body("{}"), wire.CodeBadRequest},
		{"body with the stream", wire.VerbStream, body("{}"), wire.CodeBadRequest},
		{"form", wire.VerbDone, func(r *http.Request) { r.Header.Set("Content-Type", "application/x-www-form-urlencoded") }, wire.CodeBadMediaType},
		{"no type", wire.VerbDone, func(r *http.Request) { r.Header.Del("Content-Type") }, wire.CodeBadMediaType},
		{"compressed", wire.VerbDone, func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }, wire.CodeBadMediaType},
		{"query", wire.VerbStatus, func(r *http.Request) { r.URL.RawQuery = "force=true" }, wire.CodeBadRequest},
		{"escaped slash", wire.VerbStatus, func(r *http.Request) { r.URL.RawPath = strings.Replace(r.URL.Path, "redis", "re%64is", 1) }, wire.CodeBadRequest},
		{"wrong method", wire.VerbStatus, func(r *http.Request) { r.Method = "PATCH" }, wire.CodeBadMethod},
		{"unknown verb", wire.VerbStatus, path(func(p string) string { return p + "/exec" }), wire.CodeUnknownPath},
		{"other version", wire.VerbStatus, path(func(p string) string { return strings.Replace(p, wire.Version, "v9", 1) }), wire.CodeUnknownVersion},
		{"way out", wire.VerbStatus, path(func(p string) string { return strings.Replace(p, "redis", "..", 1) }), wire.CodeBadRequest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := len(b.fake.Requests())
			e := wantError(t, b.ask(b.node, tc.verb, Session, tc.change), tc.want)
			if tc.want == wire.CodeUnknownVersion && !strings.Contains(e.Details["supported"], wire.Version) {
				t.Errorf("the refusal does not name what is supported: %+v", e)
			}
			if len(b.fake.Requests()) != before {
				t.Error("the request reached the sessions")
			}
		})
	}
}

func attacks(t *testing.T, b *bench, handler func(*Fake) http.Handler) {
	foreign := NewCA(t)
	guess := Session
	guess.ID = "c10e0000-0000-4000-8000-000000000002"
	other := Session
	other.Pod = "postgres"
	for _, tc := range []struct {
		name    string
		client  *http.Client
		session wire.Session
		want    wire.Code
	}{
		{"nobody", b.as(), Session, wire.CodeUnknownCaller},
		{"a user", b.as(b.ca.Issue(t, "jane")), Session, wire.CodeForbidden},
		{"a user who looks like a node", b.as(b.ca.Issue(t, "system:node:")), Session, wire.CodeForbidden},
		{"another node", b.as(b.ca.Node(t, "n3")), Session, wire.CodeForbidden},
		{"a guessed session", b.node, guess, wire.CodeUnknownSession},
		{"another pod with this session", b.node, other, wire.CodeUnknownSession},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, v := range wire.Verbs() {
				wantError(t, b.ask(tc.client, v, tc.session, nil), tc.want)
			}
		})
	}
	t.Run("a certificate of another cluster", func(t *testing.T) {
		resp, err := b.as(foreign.Node(t, "n2")).Get(b.srv.URL + Session.Path(wire.VerbStatus))
		if err == nil {
			defer resp.Body.Close()
			wantError(t, resp, wire.CodeUnknownCaller)
		}
	})
	t.Run("plain HTTP to the port", func(t *testing.T) {
		resp, err := http.Get(strings.Replace(b.srv.URL, "https", "http", 1) + Session.Path(wire.VerbStream))
		if err == nil {
			defer resp.Body.Close()
			if resp.StatusCode < 400 {
				t.Errorf("answered %s", resp.Status)
			}
		}
	})
	t.Run("plain HTTP to the handler", func(t *testing.T) {
		fake := NewFake()
		rec := httptest.NewRecorder()
		req := httptest.NewRequest("GET", "http://n1"+Session.Path(wire.VerbStream), nil)
		req.Header.Set("X-Remote-User", "system:node:n2")
		handler(fake).ServeHTTP(rec, req)
		wantError(t, rec.Result(), wire.CodeInsecure)
	})
	t.Run("a replayed request by somebody else", func(t *testing.T) {
		// What n2 was answered, byte for byte, says nothing to n3.
		first := b.ask(b.node, wire.VerbCommit, Session, nil)
		if first.StatusCode != http.StatusOK {
			t.Fatal(first.Status)
		}
		wantError(t, b.ask(b.as(b.ca.Node(t, "n3")), wire.VerbCommit, Session, nil), wire.CodeForbidden)
	})
	if n := len(b.fake.Requests()); n != 1 {
		t.Errorf("%d requests reached the session, want the one of n2", n)
	}
}

func callerGoesAway(t *testing.T, b *bench) {
	for _, v := range []wire.Verb{wire.VerbFreeze, wire.VerbCommit} {
		b.fake.Hold[v] = make(chan struct{})
	}
	r, w := io.Pipe()
	b.fake.Checkpoint = r
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", b.srv.URL+Session.Path(wire.VerbStream), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := b.node.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	cancel()
	if sent := next(t, b.fake.Sent); sent.Err == nil {
		t.Error("a stream that nobody reads was sent")
	}
	if _, err := w.Write([]byte("more")); err == nil {
		t.Error("the runtime is still read from")
	}
}

func limits(t *testing.T, b *bench) {
	hold := make(chan struct{})
	b.fake.Hold[wire.VerbFreeze] = hold
	codes := make(chan int, 2)
	for range 2 {
		go func() {
			body, _ := json.Marshal(Bodies[wire.VerbFreeze])
			resp, err := b.node.Post(b.srv.URL+Session.Path(wire.VerbFreeze), wire.ContentJSON, bytes.NewReader(body))
			if err != nil {
				codes <- 0
				return
			}
			defer resp.Body.Close()
			codes <- resp.StatusCode
		}()
	}
	for len(b.fake.Requests()) < 2 {
		time.Sleep(time.Millisecond) // There is no event for "a request is waiting".
	}
	wantError(t, b.ask(b.node, wire.VerbStatus, Session, nil), wire.CodeTooMany)
	close(hold)
	for range 2 {
		if code := next(t, codes); code != http.StatusOK {
			t.Errorf("status %d", code)
		}
	}
	if resp := b.ask(b.node, wire.VerbStatus, Session, nil); resp.StatusCode != http.StatusOK {
		t.Errorf("the limit stays after the requests have ended: %s", resp.Status)
	}

	// A reader that does not read is cut off, and reading from the runtime stops with it.
	endless := &counter{}
	b.fake.Checkpoint = endless
	resp := b.ask(b.node, wire.VerbStream, Session, nil)
	sent := next(t, b.fake.Sent)
	if sent.Err == nil {
		t.Error("an endless stream was sent")
	}
	if got := endless.read(); got > sent.Bytes+1<<20 {
		t.Errorf("%d bytes were read for %d sent", got, sent.Bytes)
	}
	_ = resp.Body.Close()
}

func next[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(wait):
		t.Fatal("nothing happened")
		panic("not reached")
	}
}
