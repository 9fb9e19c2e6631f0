// Package snapshot serves checkpoints of whole pods to administrators: POST
// /podcheckpoint/NAMESPACE/POD on the kubelet's port answers with a tar archive of what
// the runtime wrote, the manifest last.
//
// A checkpoint has everything that the pod has in memory. So the kubelet authorises the
// request as nodes/checkpoint before it gets here, nodes are refused whatever they were
// granted, and on the node's disk the checkpoint is for root only and has no name any
// more when it is sent. The pod runs on before the first byte goes out, so a slow client
// costs disk space and nothing else.
//
// The tests run the handler over a fake agent; that the kubelet authorises in front of
// it, and that archives hold what they should, is shown by the end-to-end tests.
package snapshot

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/wire"
)

// Pods takes checkpoints of the pods of this node.
type Pods interface {
	// Checkpoint writes a checkpoint into an empty directory that is for its owner only.
	// The pod is not frozen any more when it returns. It ends early with the context.
	// Errors are best *wire.Error.
	Checkpoint(ctx context.Context, namespace, pod, by, dir string) error
}

const (
	// ContentType is that of the archive.
	ContentType = "application/x-tar"
	// atOnce bounds the checkpoints that one node takes or sends.
	atOnce = 4
	// stall bounds every wait for the client to take the next bytes, total all of them.
	stall = time.Minute
	total = 4 * time.Hour
	// nodePrefix begins the user name of every node.
	nodePrefix = "system:node:"
)

// Server is the handler for everything below wire.PodCheckpoints.
type Server struct {
	pods     Pods
	dir      string
	identify func(*http.Request) (user string, ok bool)
	log      klog.Logger

	mu sync.Mutex
	// busy has the pods of which a checkpoint is taken or sent.
	busy map[string]bool
}

// New returns a handler that logs to the logger of ctx and keeps checkpoints below a
// directory until they are sent. It is to be registered behind the kubelet's
// authentication and authorisation. identify returns the user that the authentication has
// found; ok is false for a request that nobody authenticated.
func New(ctx context.Context, pods Pods, dir string, identify func(*http.Request) (user string, ok bool)) *Server {
	return &Server{pods: pods, dir: dir, identify: identify, log: klog.FromContext(ctx), busy: make(map[string]bool)}
}

// Clear removes what a kubelet that was killed has left in the directory.
func Clear(dir string) error { return os.RemoveAll(dir) }

// call is one request.
type call struct{ user, namespace, pod string }

// errCut is wrapped by what goes wrong in the middle of an answer.
var errCut = errors.New("the answer was cut short")

// ServeHTTP answers one request and logs one line about it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	c, sent, err := s.serve(w, r)
	log := s.log.WithValues("pod", klog.KRef(c.namespace, c.pod), "caller", c.user, "remote", r.RemoteAddr, "duration", time.Since(began))
	switch {
	case err == nil:
		log.Info("Served the checkpoint of a pod", "bytes", sent)
	case errors.Is(err, errCut):
		log.Error(err, "The checkpoint of a pod was cut short", "bytes", sent)
		// The client must not take what it got for all there is.
		panic(http.ErrAbortHandler)
	default:
		e := asWire(err)
		log.Info("Refused the checkpoint of a pod", "code", e.Code, "reason", e.Message)
		refuse(w, e)
	}
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) (call, int64, error) {
	c, err := s.parse(r)
	if err != nil {
		return c, 0, err
	}
	if err := s.enter(c); err != nil {
		return c, 0, err
	}
	defer s.leave(c)
	dir, err := s.place()
	if err != nil {
		return c, 0, wire.Errorf(wire.CodeInternal, "make a directory for the checkpoint: %v", err)
	}
	a, err := s.take(r.Context(), c, dir)
	// Open files stay. Without a name they end with this process, whatever ends it.
	if rerr := os.RemoveAll(dir); rerr != nil && err == nil {
		err = wire.Errorf(wire.CodeInternal, "remove the directory of the checkpoint: %v", rerr)
	}
	if a != nil {
		defer a.close()
	}
	if err != nil {
		return c, 0, err
	}
	sent, err := a.send(w)
	if err == nil {
		err = r.Context().Err()
	}
	if err != nil {
		return c, sent, errors.Join(errCut, err)
	}
	return c, sent, nil
}

// parse says who wants which pod. What it returns is for the log also with an error.
func (s *Server) parse(r *http.Request) (c call, err error) {
	// Without TLS nobody's identity is worth anything, and the memory would be readable.
	if r.TLS == nil {
		return c, wire.Errorf(wire.CodeInsecure, "checkpoints are served over TLS only")
	}
	var ok bool
	if c.user, ok = s.identify(r); !ok || c.user == "" {
		return c, wire.Errorf(wire.CodeUnknownCaller, "the caller is not authenticated")
	}
	rest, ok := strings.CutPrefix(r.URL.Path, wire.PodCheckpoints)
	c.namespace, c.pod, _ = strings.Cut(rest, "/")
	switch {
	case strings.HasPrefix(c.user, nodePrefix):
		return c, wire.Errorf(wire.CodeForbidden, "user %q is a node; nodes get a pod's memory by a migration only", c.user)
	case !ok || c.namespace == "" || c.pod == "" || strings.Contains(c.pod, "/"):
		return c, wire.Errorf(wire.CodeUnknownPath, "the path is not %sNAMESPACE/POD", wire.PodCheckpoints)
	case r.URL.RawPath != "" || r.URL.RawQuery != "" || r.URL.ForceQuery || r.ContentLength != 0:
		return c, wire.Errorf(wire.CodeBadRequest, "the request has no query, no body and no escaped characters in its path")
	case r.Method != http.MethodPost:
		// A checkpoint freezes the pod for a moment, so it is not for those who may only
		// read, and nothing on the way may ask twice.
		return c, wire.Errorf(wire.CodeBadMethod, "the method of a checkpoint is POST, not %s", r.Method)
	}
	return c, nil
}

func (s *Server) enter(c call) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := c.namespace + "/" + c.pod
	switch {
	case s.busy[key]:
		return &wire.Error{
			Code:    wire.CodeBusy,
			Message: fmt.Sprintf("a checkpoint of pod %s is being taken or sent", key),
			Cure:    "wait until it has ended",
		}
	case len(s.busy) >= atOnce:
		return &wire.Error{
			Code:    wire.CodeTooMany,
			Message: fmt.Sprintf("this node takes or sends %d checkpoints already", atOnce),
			Cure:    "try again when one of them has ended",
		}
	}
	s.busy[key] = true
	return nil
}

func (s *Server) leave(c call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, c.namespace+"/"+c.pod)
}

// place makes a directory that never was.
func (s *Server) place() (string, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return "", err
	}
	return os.MkdirTemp(s.dir, "pod-")
}

// archive is a checkpoint that waits to be sent.
type archive struct {
	files []*os.File
	sizes []int64
}

// parts are the files of a checkpoint in the order of the archive: one that was cut off
// has no manifest.
var parts = []string{cri.PodStream, cri.PodManifest}

// take has a checkpoint written and opens it.
func (s *Server) take(ctx context.Context, c call, dir string) (*archive, error) {
	if err := s.pods.Checkpoint(ctx, c.namespace, c.pod, c.user, dir); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, wire.Errorf(wire.CodeInternal, "open the checkpoint: %v", err)
	}
	defer root.Close()
	a := &archive{}
	for _, name := range parts {
		f, err := root.Open(name)
		if err != nil {
			return a, wire.Errorf(wire.CodeRuntime, "the runtime has not written %s: %v", name, err)
		}
		a.files = append(a.files, f)
		st, err := f.Stat()
		if err != nil || !st.Mode().IsRegular() {
			return a, wire.Errorf(wire.CodeRuntime, "%s of the checkpoint is no file: %v", name, err)
		}
		a.sizes = append(a.sizes, st.Size())
	}
	return a, nil
}

func (a *archive) close() {
	for _, f := range a.files {
		f.Close()
	}
}

const block = 512

// length is that of the archive: headers, files filled up to blocks, and two blocks.
func (a *archive) length() int64 {
	n := int64(2 * block)
	for _, size := range a.sizes {
		n += block + (size+block-1)/block*block
	}
	return n
}

// send writes the archive. It has a length, so who gets less sees it.
func (a *archive) send(w http.ResponseWriter) (int64, error) {
	h := w.Header()
	h.Set("Content-Type", ContentType)
	h.Set("Content-Length", strconv.FormatInt(a.length(), 10))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	out := &paced{w: w, rc: http.NewResponseController(w), end: time.Now().Add(total)}
	defer func() { _ = out.rc.SetWriteDeadline(time.Time{}) }()
	t := tar.NewWriter(out)
	buf := make([]byte, 256<<10)
	for i, f := range a.files {
		// The format says how long a header is.
		err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: parts[i], Mode: 0o600, Size: a.sizes[i], ModTime: time.Now().Truncate(time.Second), Format: tar.FormatGNU})
		if err == nil {
			_, err = io.CopyBuffer(onlyWriter{t}, io.LimitReader(f, a.sizes[i]), buf)
		}
		if err != nil {
			return out.n, err
		}
	}
	return out.n, t.Close()
}

// onlyWriter keeps io.CopyBuffer to the buffer it is given.
type onlyWriter struct{ io.Writer }

// paced gives up a client that takes nothing, or is at it for too long.
type paced struct {
	w   io.Writer
	rc  *http.ResponseController
	end time.Time
	n   int64
}

func (p *paced) Write(b []byte) (int, error) {
	deadline := time.Now().Add(stall)
	if p.end.Before(deadline) {
		deadline = p.end
	}
	// A server that cannot do this has a deadline of its own.
	_ = p.rc.SetWriteDeadline(deadline)
	n, err := p.w.Write(b)
	p.n += int64(n)
	return n, err
}

func asWire(err error) *wire.Error {
	var e *wire.Error
	if errors.As(err, &e) {
		return e
	}
	return wire.Errorf(wire.CodeInternal, "%v", err)
}

func refuse(w http.ResponseWriter, e *wire.Error) {
	b, err := wire.Encode(e)
	if err != nil {
		e = wire.Errorf(e.Code, "the error is too long to be sent")
		b, _ = wire.Encode(e)
	}
	if e.Code == wire.CodeBadMethod {
		w.Header().Set("Allow", http.MethodPost)
	}
	w.Header().Set("Content-Type", wire.ContentJSON)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(e.Code.HTTPStatus())
	_, _ = w.Write(b)
}
