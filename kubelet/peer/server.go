package peer

import (
	"context"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"podmig.dev/podmig/kubelet/wire"
)

// nodePrefix begins the user name of every node.
const nodePrefix = "system:node:"

// Limits bound what a Server does. Zero values mean the defaults.
type Limits struct {
	// Deadline bounds every request but the stream; 3 minutes by default, which leaves
	// room for a freeze. The engine's own deadlines are shorter.
	Deadline time.Duration
	// Body bounds the time in which a body has to arrive; 10 s by default.
	Body time.Duration
	// Stall bounds every wait for the peer to take the next bytes of a stream; 30 s by default.
	Stall time.Duration
	// Requests and PerCaller bound what runs at the same time; 128 and 32 by default.
	Requests, PerCaller int
}

func (l Limits) withDefaults() Limits {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&l.Deadline, 3 * time.Minute}, {&l.Body, 10 * time.Second}, {&l.Stall, 30 * time.Second}} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	if l.Requests <= 0 {
		l.Requests = 128
	}
	if l.PerCaller <= 0 {
		l.PerCaller = 32
	}
	return l
}

// Server is the handler for everything below wire.Root.
type Server struct {
	// Refused, if set before the first request, hears of every refused request. The log
	// has each kind once per session and caller, so this is what to count.
	Refused func(v wire.Verb, c wire.Code)

	sessions Sessions
	identify func(*http.Request) (user string, ok bool)
	limits   Limits
	log      klog.Logger

	mu      sync.Mutex
	running map[string]int // by user
	total   int
	said    map[refusal]bool
}

// refusal is what is logged once.
type refusal struct {
	user, session string
	// host is set for callers who may have no name.
	host string
	verb wire.Verb
	code wire.Code
}

// maxSaid bounds what the server remembers about refusals; beyond it, it forgets and
// may say something twice.
const maxSaid = 4096

// NewServer returns a handler that logs to the logger of ctx. It is to be registered
// at wire.Root and below, behind the kubelet's authentication and authorisation.
// identify returns the user that the authentication has found; ok is false for a
// request that nobody authenticated.
func NewServer(ctx context.Context, sessions Sessions, identify func(*http.Request) (user string, ok bool)) *Server {
	s := &Server{sessions: sessions, identify: identify, log: klog.FromContext(ctx),
		running: map[string]int{}, said: map[refusal]bool{}}
	s.Limit(Limits{})
	return s
}

// Limit changes the limits, before the first request.
func (s *Server) Limit(l Limits) { s.limits = l.withDefaults() }

// ServeHTTP answers one request and logs one line about it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c, sent, err := s.serve(w, r)
	if errors.Is(err, errCut) {
		s.report(r, c, sent, start, err)
		// The peer must not take what it got for all there is.
		panic(http.ErrAbortHandler)
	}
	if err != nil && !sent.begun {
		sendError(w, err)
	}
	s.report(r, c, sent, start, err)
}

// sent is what was answered so far.
type sent struct {
	begun bool
	bytes uint64
}

// errCut is wrapped by what goes wrong in the middle of an answer.
var errCut = errors.New("the answer was cut short")

func (s *Server) serve(w http.ResponseWriter, r *http.Request) (Call, sent, error) {
	var c Call
	// Without TLS nobody's identity is worth anything.
	if r.TLS == nil {
		return c, sent{}, wire.Errorf(wire.CodeInsecure, "migration requests are served over TLS only")
	}
	user, ok := s.identify(r)
	if !ok || user == "" {
		return c, sent{}, wire.Errorf(wire.CodeUnknownCaller, "the caller is not authenticated")
	}
	c.Caller.User = user
	if c.Caller.Node, ok = strings.CutPrefix(user, nodePrefix); !ok || c.Caller.Node == "" {
		return c, sent{}, wire.Errorf(wire.CodeForbidden, "user %q is not a node; only the node of a clone pod may ask", user)
	}
	if r.URL.RawPath != "" || r.URL.RawQuery != "" || r.URL.ForceQuery {
		return c, sent{}, wire.Errorf(wire.CodeBadRequest, "a migration request has no query and no escaped characters in its path")
	}
	var err error
	if c.Verb, c.Session, err = wire.ParsePath(r.Method, r.URL.Path); err != nil {
		return c, sent{}, err
	}
	if !s.enter(user) {
		w.Header().Set("Retry-After", "1")
		return c, sent{}, wire.Errorf(wire.CodeTooMany, "this node already serves as many migration requests as it does at once")
	}
	defer s.leave(user)

	if c.Verb == wire.VerbStream {
		return s.stream(w, r, c)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.limits.Deadline)
	defer cancel()
	answer, err := s.dispatch(ctx, w, r, c)
	if err == nil {
		var b []byte
		if b, err = wire.Encode(answer); err == nil {
			w.Header().Set("Content-Type", wire.ContentJSON)
			n, werr := w.Write(b)
			return c, sent{begun: true, bytes: uint64(n)}, werr
		}
	}
	if ctx.Err() == context.DeadlineExceeded && wire.CodeOf(err) == "" {
		err = wire.Errorf(wire.CodeDeadline, "no answer within %s; the request may still have its effect", s.limits.Deadline)
	}
	return c, sent{}, err
}

// dispatch reads the body that belongs to the verb and calls the method.
func (s *Server) dispatch(ctx context.Context, w http.ResponseWriter, r *http.Request, c Call) (any, error) {
	switch c.Verb {
	case wire.VerbOpen:
		return with(s, w, r, func(b *wire.OpenRequest) (*wire.OpenResponse, error) { return s.sessions.Open(ctx, c, b) })
	case wire.VerbFreeze:
		return with(s, w, r, func(b *wire.FreezeRequest) (*wire.FreezeResponse, error) { return s.sessions.Freeze(ctx, c, b) })
	case wire.VerbCommit:
		return with(s, w, r, func(b *wire.CommitRequest) (*wire.CommitResponse, error) { return s.sessions.Commit(ctx, c, b) })
	case wire.VerbDone:
		return with(s, w, r, func(b *wire.DoneRequest) (*wire.Empty, error) { return &wire.Empty{}, s.sessions.Done(ctx, c, b) })
	case wire.VerbFailed:
		return with(s, w, r, func(b *wire.FailureRequest) (*wire.Empty, error) { return &wire.Empty{}, s.sessions.Failed(ctx, c, b) })
	case wire.VerbAbort:
		return with(s, w, r, func(b *wire.FailureRequest) (*wire.Empty, error) { return &wire.Empty{}, s.sessions.Abort(ctx, c, b) })
	case wire.VerbStatus:
		return bare(r, func() (*wire.StatusResponse, error) { return s.sessions.Status(ctx, c) })
	case wire.VerbOutcome:
		return bare(r, func() (*wire.OutcomeResponse, error) { return s.sessions.Outcome(ctx, c) })
	}
	return nil, wire.Errorf(wire.CodeUnknownPath, "verb %q is not served", c.Verb)
}

// with calls f with the body of the request.
func with[B, A any](s *Server, w http.ResponseWriter, r *http.Request, f func(*B) (*A, error)) (any, error) {
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != wire.ContentJSON {
		return nil, wire.Errorf(wire.CodeBadMediaType, "the body has to be %s", wire.ContentJSON)
	}
	if r.Header.Get("Content-Encoding") != "" {
		return nil, wire.Errorf(wire.CodeBadMediaType, "the body must not be encoded")
	}
	rc := http.NewResponseController(w)
	// A server that cannot do this has a deadline of its own.
	_ = rc.SetReadDeadline(time.Now().Add(s.limits.Body))
	var body B
	err := wire.Decode(http.MaxBytesReader(w, r.Body, wire.MaxBody+1), &body)
	_ = rc.SetReadDeadline(time.Time{})
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			err = wire.Errorf(wire.CodeTooLarge, "the body is larger than %d bytes", wire.MaxBody)
		} else if wire.CodeOf(err) == "" {
			err = wire.Errorf(wire.CodeBadRequest, "the body did not arrive: %v", err)
		}
		return nil, err
	}
	a, err := f(&body)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// bare calls f for a request without a body.
func bare[A any](r *http.Request, f func() (*A, error)) (any, error) {
	if err := noBody(r); err != nil {
		return nil, err
	}
	a, err := f()
	if err != nil {
		return nil, err
	}
	return a, nil
}

func noBody(r *http.Request) error {
	if r.ContentLength != 0 {
		return wire.Errorf(wire.CodeBadRequest, "this request has no body")
	}
	return nil
}

func (s *Server) stream(w http.ResponseWriter, r *http.Request, c Call) (Call, sent, error) {
	if err := noBody(r); err != nil {
		return c, sent{}, err
	}
	st, err := s.sessions.Stream(r.Context(), c)
	if err != nil {
		return c, sent{}, err
	}
	w.Header().Set("Content-Type", wire.ContentStream)
	w.Header().Set(wire.HeaderStreamVersion, strconv.FormatUint(uint64(st.Version), 10))
	n, err := s.copy(w, r, st.Body)
	st.Sent(n, err)
	return c, sent{begun: true, bytes: n}, err
}

// buffers are shared by all streams; a stream uses one at a time, whatever its length.
var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// copy sends body to its end and closes it. What the peer does not take is not read:
// the runtime feels the peer's pace. Errors wrap errCut.
func (s *Server) copy(w http.ResponseWriter, r *http.Request, body io.ReadCloser) (n uint64, err error) {
	// A peer that went away must not leave the runtime waiting for a reader.
	stop := context.AfterFunc(r.Context(), func() { _ = body.Close() })
	defer func() {
		stop()
		_ = body.Close()
	}()
	rc := http.NewResponseController(w)
	defer func() { _ = rc.SetWriteDeadline(time.Time{}) }()
	w.Header().Set("Trailer", wire.TrailerStreamBytes)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	if err := rc.Flush(); err != nil {
		return 0, errors.Join(errCut, err)
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		k, readErr := body.Read(*buf)
		if k > 0 {
			_ = rc.SetWriteDeadline(time.Now().Add(s.limits.Stall))
			m, err := w.Write((*buf)[:k])
			n += uint64(m)
			if err == nil {
				// What is buffered here would be missing on the other side until the next round.
				err = rc.Flush()
			}
			if err != nil {
				return n, errors.Join(errCut, err)
			}
		}
		if readErr == io.EOF {
			if err := r.Context().Err(); err != nil {
				return n, errors.Join(errCut, err)
			}
			w.Header().Set(wire.TrailerStreamBytes, strconv.FormatUint(n, 10))
			return n, nil
		}
		if readErr != nil {
			return n, errors.Join(errCut, readErr)
		}
	}
}

func sendError(w http.ResponseWriter, err error) {
	e := asWire(err)
	b, encErr := wire.Encode(e)
	if encErr != nil {
		e = wire.Errorf(e.Code, "the error is too long to be sent")
		b, _ = wire.Encode(e)
	}
	w.Header().Set("Content-Type", wire.ContentJSON)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(e.Code.HTTPStatus())
	_, _ = w.Write(b)
}

func asWire(err error) *wire.Error {
	var e *wire.Error
	if errors.As(err, &e) {
		return e
	}
	return wire.Errorf(wire.CodeInternal, "%v", err)
}

func (s *Server) enter(user string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= s.limits.Requests || s.running[user] >= s.limits.PerCaller {
		return false
	}
	s.total++
	s.running[user]++
	return true
}

func (s *Server) leave(user string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.running[user]--; s.running[user] == 0 {
		delete(s.running, user)
	}
}

// report logs one line: every request that was served, and each kind of refusal once.
func (s *Server) report(r *http.Request, c Call, out sent, start time.Time, err error) {
	log := s.log.WithValues("verb", c.Verb, "namespace", c.Namespace, "pod", c.Pod,
		"session", c.ID, "caller", c.Caller.User, "duration", time.Since(start))
	switch {
	case err == nil:
		log.V(2).Info("Served migration request", "bytes", out.bytes)
	case out.begun:
		log.Error(err, "Migration answer was cut short", "bytes", out.bytes)
	default:
		e := asWire(err)
		if s.Refused != nil {
			s.Refused(c.Verb, e.Code)
		}
		if s.first(refusal{user: c.Caller.User, session: c.ID, verb: c.Verb, code: e.Code}) {
			log.Info("Refused migration request", "code", e.Code, "reason", e.Message, "remote", r.RemoteAddr)
		}
	}
}

// RefusedBefore reports a request that never got here: the kubelet's authentication or
// authorisation has refused it. user is empty if nobody was authenticated. Whatever
// such a caller asks for, it is one line for each user, code and host.
func (s *Server) RefusedBefore(user, remote string, e *wire.Error) {
	if s.Refused != nil {
		s.Refused("", e.Code)
	}
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	if s.first(refusal{user: user, host: host, code: e.Code}) {
		s.log.Info("Refused migration request", "caller", user, "code", e.Code, "reason", e.Message, "remote", remote)
	}
}

func (s *Server) first(f refusal) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.said[f] {
		return false
	}
	if len(s.said) >= maxSaid {
		clear(s.said)
	}
	s.said[f] = true
	return true
}
