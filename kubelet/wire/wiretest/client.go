package wiretest

import (
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
	"sync/atomic"
	"testing"
	"time"

	"podmig.dev/podmig/kubelet/wire"
)

// counter is an endless reader that counts.
type counter struct{ n atomic.Uint64 }

func (c *counter) Read(p []byte) (int, error) {
	c.n.Add(uint64(len(p)))
	return len(p), nil
}

func (c *counter) read() uint64 { return c.n.Load() }

// Client is what the suite needs of a client under test. Ask makes a request with a
// body from Bodies (or nil) and returns the decoded answer.
type Client interface {
	Ask(ctx context.Context, v wire.Verb, s wire.Session, body any) (any, error)
	Stream(ctx context.Context, s wire.Session) (version uint32, body io.ReadCloser, err error)
}

// Kind is what an error of a client has to mean.
type Kind string

const (
	Refused  Kind = "refused"
	Gone     Kind = "gone"
	NoAnswer Kind = "no answer"
)

// Clients checks a client. dial returns a new one for an address, which waits 200 ms
// for the next byte of a stream; node is the name of the node at the address. kind
// classifies an error of it.
func Clients(t *testing.T, dial func(address, node string, cfg *tls.Config) (Client, error), kind func(error) Kind) {
	t.Run("every verb", func(t *testing.T) { clientVerbs(t, dial) })
	t.Run("answers", func(t *testing.T) { clientAnswers(t, dial, kind) })
	t.Run("streams", func(t *testing.T) { clientStreams(t, dial) })
	t.Run("identity of the server", func(t *testing.T) { clientTrust(t, dial, kind) })
	t.Run("bad configuration", func(t *testing.T) {
		ca := NewCA(t)
		good := ca.ClientTLS(ca.Node(t, "n2"))
		insecure := good.Clone()
		insecure.InsecureSkipVerify = true
		system := good.Clone()
		system.RootCAs = nil
		for name, try := range map[string]func() (Client, error){
			"no TLS":       func() (Client, error) { return dial("127.0.0.1:1", "n1", nil) },
			"not verified": func() (Client, error) { return dial("127.0.0.1:1", "n1", insecure) },
			"the CAs of the system instead of the cluster's": func() (Client, error) { return dial("127.0.0.1:1", "n1", system) },
			"no port": func() (Client, error) { return dial("127.0.0.1", "n1", good) },
		} {
			if _, err := try(); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	})
}

// serve starts a server of node n1 and returns a client of n2 for it.
func serve(t *testing.T, dial func(string, string, *tls.Config) (Client, error), h http.HandlerFunc) Client {
	t.Helper()
	ca := NewCA(t)
	srv := httptest.NewUnstartedServer(h)
	srv.TLS = ca.ServerTLS(ca.Node(t, "n1"))
	srv.StartTLS()
	t.Cleanup(srv.Close)
	c, err := dial(srv.Listener.Addr().String(), "n1", ca.ClientTLS(ca.Node(t, "n2")))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func background(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	t.Cleanup(cancel)
	return ctx
}

func clientVerbs(t *testing.T, dial func(string, string, *tls.Config) (Client, error)) {
	for _, v := range wire.Verbs() {
		if v == wire.VerbStream {
			continue
		}
		t.Run(string(v), func(t *testing.T) {
			c := serve(t, dial, func(w http.ResponseWriter, r *http.Request) {
				got, s, err := wire.ParsePath(r.Method, r.URL.Path)
				if err != nil || got != v || s != Session || r.URL.RawQuery != "" || r.ProtoMajor != 1 {
					t.Errorf("%s %s: %s %+v, error %v", r.Method, r.URL, got, s, err)
				}
				if user, ok := Identify(r); !ok || user != "system:node:n2" {
					t.Errorf("asked as %q", user)
				}
				if want := Bodies[v]; want != nil {
					body := reflect.New(reflect.TypeOf(want).Elem()).Interface()
					if err := wire.Decode(r.Body, body); err != nil || !reflect.DeepEqual(body, want) {
						t.Errorf("body %+v, error %v", body, err)
					}
				} else if b, _ := io.ReadAll(r.Body); len(b) != 0 {
					t.Errorf("body %q where none belongs", b)
				}
				answer(w, Answers[v])
			})
			got, err := c.Ask(background(t), v, Session, Bodies[v])
			if err != nil {
				t.Fatal(err)
			}
			if got != nil && !reflect.DeepEqual(got, Answers[v]) {
				t.Errorf("got %+v", got)
			}
		})
	}
	c := serve(t, dial, func(w http.ResponseWriter, r *http.Request) { t.Error("was asked") })
	bad := Session
	bad.Pod = "../../exec"
	if _, err := c.Ask(background(t), wire.VerbStatus, bad, nil); err == nil {
		t.Error("a pod's name may leave the path")
	}
}

func answer(w http.ResponseWriter, v any) {
	b, _ := json.Marshal(v)
	w.Header().Set("Content-Type", wire.ContentJSON)
	_, _ = w.Write(b)
}

func clientAnswers(t *testing.T, dial func(string, string, *tls.Config) (Client, error), kind func(error) Kind) {
	text := func(status int, typ, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", typ)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	code := func(c wire.Code) http.HandlerFunc {
		return text(c.HTTPStatus(), wire.ContentJSON, fmt.Sprintf(`{"code":%q,"message":"m"}`, c))
	}
	for _, tc := range []struct {
		name string
		h    http.HandlerFunc
		want Kind
		code wire.Code
	}{
		{"aborted", code(wire.CodeAborted), Refused, wire.CodeAborted},
		{"given away", code(wire.CodeGivenAway), Refused, wire.CodeGivenAway},
		{"preflight", code(wire.CodePreflight), Refused, wire.CodePreflight},
		{"unknown session", code(wire.CodeUnknownSession), Gone, wire.CodeUnknownSession},
		{"overload", code(wire.CodeTooMany), NoAnswer, wire.CodeTooMany},
		{"deadline", code(wire.CodeDeadline), NoAnswer, wire.CodeDeadline},
		{"internal", code(wire.CodeInternal), NoAnswer, wire.CodeInternal},
		{"unauthenticated kubelet", text(401, "text/plain", "Unauthorized"), Refused, wire.CodeUnknownCaller},
		{"unauthorised kubelet", text(403, "text/plain", "Forbidden (user=system:node:n2)"), Refused, wire.CodeForbidden},
		{"kubelet without podmig", text(404, "text/plain", "404 page not found"), Refused, wire.CodeDisabled},
		{"proxy", text(502, "text/html", "<html>"), NoAnswer, ""},
		{"code that does not fit the status", text(500, wire.ContentJSON, `{"code":"aborted","message":"m"}`), NoAnswer, ""},
		{"error with more than an error", text(409, wire.ContentJSON, `{"code":"aborted","message":"m","soul":1}`), NoAnswer, ""},
		{"yes that is no answer", text(200, wire.ContentJSON, `{"streamVersion"`), NoAnswer, ""},
		{"yes with an unknown field", text(200, wire.ContentJSON, `{"soul":1}`), NoAnswer, ""},
		{"empty yes", text(200, wire.ContentJSON, ""), NoAnswer, ""},
		{"endless yes", func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(w, io.LimitReader(&counter{}, 64<<20))
		}, NoAnswer, ""},
		{"another yes", text(204, "", ""), NoAnswer, ""},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+r.Host+"/elsewhere", http.StatusTemporaryRedirect)
		}, NoAnswer, ""},
		{"connection lost", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, NoAnswer, ""},
		{"connection lost in the answer", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, `{"state":`)
			panic(http.ErrAbortHandler)
		}, NoAnswer, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := serve(t, dial, tc.h)
			for _, v := range []wire.Verb{wire.VerbCommit, wire.VerbOpen} {
				_, err := c.Ask(background(t), v, Session, Bodies[v])
				if err == nil {
					t.Fatalf("%s: taken for a yes", v)
				}
				if got := kind(err); got != tc.want || wire.CodeOf(err) != tc.code {
					t.Errorf("%s: %v is %q with code %q, want %q with %q", v, err, got, wire.CodeOf(err), tc.want, tc.code)
				}
			}
		})
	}
	t.Run("no answer before the deadline", func(t *testing.T) {
		gone := untilEnd(t)
		c := serve(t, dial, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.ReadAll(r.Body)
			select {
			case <-r.Context().Done():
			case <-gone:
			}
		})
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		_, err := c.Ask(ctx, wire.VerbCommit, Session, Bodies[wire.VerbCommit])
		if kind(err) != NoAnswer || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

// untilEnd returns a channel that is closed when the test ends.
func untilEnd(t *testing.T) chan struct{} {
	c := make(chan struct{})
	t.Cleanup(func() { close(c) })
	return c
}

func clientStreams(t *testing.T, dial func(string, string, *tls.Config) (Client, error)) {
	begin := func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", wire.ContentStream)
		w.Header().Set(wire.HeaderStreamVersion, "3")
		w.Header().Set("Trailer", wire.TrailerStreamBytes)
		w.WriteHeader(200)
	}
	read := func(t *testing.T, h http.HandlerFunc) (string, error) {
		_, body, err := serve(t, dial, h).Stream(background(t), Session)
		if err != nil {
			return "", err
		}
		defer body.Close()
		b, err := io.ReadAll(body)
		return string(b), err
	}
	t.Run("whole", func(t *testing.T) {
		want := strings.Repeat("page", 1<<18)
		got, err := read(t, func(w http.ResponseWriter, r *http.Request) {
			begin(w)
			_, _ = io.WriteString(w, want)
			w.Header().Set(wire.TrailerStreamBytes, fmt.Sprint(len(want)))
		})
		if err != nil || got != want {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
	})
	for name, h := range map[string]http.HandlerFunc{
		"no trailer":    func(w http.ResponseWriter, r *http.Request) { begin(w); _, _ = io.WriteString(w, "page") },
		"wrong trailer": func(w http.ResponseWriter, r *http.Request) { begin(w); w.Header().Set(wire.TrailerStreamBytes, "7") },
		"aborted":       func(w http.ResponseWriter, r *http.Request) { begin(w); panic(http.ErrAbortHandler) },
		"stalled": func(w http.ResponseWriter, r *http.Request) {
			begin(w)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		},
		"no version": func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Type", wire.ContentStream) },
		"other type": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set(wire.HeaderStreamVersion, "3")
			w.Header().Set("Content-Type", "text/html")
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := read(t, h); err == nil {
				t.Errorf("taken for whole: %q", got)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		_, err := read(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", wire.ContentJSON)
			w.WriteHeader(409)
			_, _ = io.WriteString(w, `{"code":"wrong-state","message":"m"}`)
		})
		if wire.CodeOf(err) != wire.CodeWrongState {
			t.Errorf("%v", err)
		}
	})
	t.Run("a reader that pauses is no stall", func(t *testing.T) {
		_, body, err := serve(t, dial, func(w http.ResponseWriter, r *http.Request) {
			begin(w)
			_, _ = io.WriteString(w, "pagepage")
			w.Header().Set(wire.TrailerStreamBytes, "8")
		}).Stream(background(t), Session)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		if _, err := io.ReadFull(body, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(400 * time.Millisecond) // Longer than the stall deadline: the pause is what is tested.
		if rest, err := io.ReadAll(body); err != nil || string(rest) != "page" {
			t.Errorf("%q, %v", rest, err)
		}
	})
}

func clientTrust(t *testing.T, dial func(string, string, *tls.Config) (Client, error), kind func(error) Kind) {
	ca, foreign := NewCA(t), NewCA(t)
	for _, tc := range []struct {
		name string
		cert tls.Certificate
		ok   bool
	}{
		{"the node", ca.Node(t, "n1"), true},
		{"the node, by its user name only", ca.Issue(t, "system:node:n1"), true},
		{"another node of the cluster", ca.Node(t, "n3"), false},
		{"the node's name in another cluster", foreign.Node(t, "n1"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asked := false
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked = true
				answer(w, Answers[wire.VerbStatus])
			}))
			srv.TLS = &tls.Config{Certificates: []tls.Certificate{tc.cert}}
			srv.StartTLS()
			defer srv.Close()
			c, err := dial(srv.Listener.Addr().String(), "n1", ca.ClientTLS(ca.Node(t, "n2")))
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Ask(background(t), wire.VerbStatus, Session, nil)
			if tc.ok != (err == nil) || tc.ok != asked {
				t.Errorf("asked %t, error %v", asked, err)
			}
			if err != nil && kind(err) != NoAnswer {
				t.Errorf("%v is %q", err, kind(err))
			}
		})
	}
	t.Run("plain HTTP", func(t *testing.T) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Error("asked in the clear") }))
		defer srv.Close()
		c, err := dial(srv.Listener.Addr().String(), "n1", ca.ClientTLS(ca.Node(t, "n2")))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Ask(background(t), wire.VerbStatus, Session, nil); err == nil {
			t.Error("accepted")
		}
	})
}
