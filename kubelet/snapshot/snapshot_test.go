package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/wire"
)

// pods is an agent whose checkpoints are what the test says.
type pods func(ctx context.Context, dir string) error

func (p pods) Checkpoint(ctx context.Context, namespace, pod, by, dir string) error {
	if namespace != "shop" || pod != "redis" || by != "anna" {
		return wire.Errorf(wire.CodeUnknownPod, "%s wants %s/%s", by, namespace, pod)
	}
	return p(ctx, dir)
}

// written is what a runtime writes.
func written(dir string, stream, manifest []byte) error {
	return errors.Join(os.WriteFile(filepath.Join(dir, cri.PodStream), stream, 0o600), os.WriteFile(filepath.Join(dir, cri.PodManifest), manifest, 0o600))
}

// serve starts a kubelet with these pods, and returns it and the folder of its
// checkpoints, which has to be empty in the end.
func serve(t *testing.T, p pods) (*httptest.Server, string) {
	dir := filepath.Join(t.TempDir(), "podcheckpoints")
	s := httptest.NewTLSServer(New(t.Context(), p, dir, func(r *http.Request) (string, bool) {
		return r.Header.Get("User"), r.Header.Get("User") != ""
	}))
	t.Cleanup(func() {
		s.Close()
		if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	})
	return s, dir
}

func ask(t *testing.T, s *httptest.Server, method, path, user string, body io.Reader) (*http.Response, []byte, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("User", user)
	resp, err := s.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

func TestArchive(t *testing.T) {
	for _, size := range []int{0, 1, 511, 512, 513, 1 << 20, 1<<20 + 7} {
		stream, manifest := bytes.Repeat([]byte{'s'}, size), []byte(`{"version":1}`)
		s, dir := serve(t, func(_ context.Context, path string) error {
			st, err := os.Stat(path)
			if err != nil || st.Mode().Perm() != 0o700 {
				t.Errorf("the directory is %v, %v", st, err)
			}
			if files, err := os.ReadDir(path); err != nil || len(files) > 0 {
				t.Errorf("it has %v, %v", files, err)
			}
			return written(path, stream, manifest)
		})
		for range 2 {
			resp, b, err := ask(t, s, http.MethodPost, "/podcheckpoint/shop/redis", "anna", nil)
			if err != nil || resp.StatusCode != http.StatusOK || resp.ContentLength != int64(len(b)) || resp.Header.Get("Content-Type") != ContentType {
				t.Fatalf("%d bytes: %s with %d bytes, %v", size, resp.Status, len(b), err)
			}
			r := tar.NewReader(bytes.NewReader(b))
			// The manifest is last.
			for i, want := range [][]byte{stream, manifest} {
				h, err := r.Next()
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				if err != nil || h.Name != []string{"checkpoint.stream", "manifest.json"}[i] || !bytes.Equal(got, want) || h.Mode != 0o600 {
					t.Errorf("%s has %d bytes and mode %o, %v", h.Name, len(got), h.Mode, err)
				}
			}
			if _, err := r.Next(); err != io.EOF {
				t.Errorf("behind it: %v", err)
			}
		}
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("the directory of all is %v, %v", st, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	s, _ := serve(t, func(context.Context, string) error { return errors.New("a surprise") })
	for _, tt := range []struct {
		method, path, user, body string
		status                   int
		text                     string
	}{
		{"POST", "/podcheckpoint/shop/redis", "", "", 401, "not authenticated"},
		{"POST", "/podcheckpoint/shop/redis", "system:node:node2", "", 403, "is a node"},
		{"GET", "/podcheckpoint/shop/redis", "anna", "", 405, "the method of a checkpoint is POST"},
		{"PUT", "/podcheckpoint/shop/redis", "anna", "", 405, "POST"},
		{"POST", "/podcheckpoint/shop/redis/main", "anna", "", 404, "NAMESPACE/POD"},
		{"POST", "/podcheckpoint/shop/", "anna", "", 404, "NAMESPACE/POD"},
		{"POST", "/podcheckpoint/shop", "anna", "", 404, "NAMESPACE/POD"},
		{"POST", "/elsewhere/shop/redis", "anna", "", 404, "NAMESPACE/POD"},
		{"POST", "/podcheckpoint/shop/redis?a=b", "anna", "", 400, "no query"},
		{"POST", "/podcheckpoint/shop/re%2Fdis", "anna", "", 404, ""},
		{"POST", "/podcheckpoint/shop/%72edis", "anna", "", 400, "no escaped characters"},
		{"POST", "/podcheckpoint/shop/redis", "anna", "", 500, "a surprise"},
		{"POST", "/podcheckpoint/shop/redis", "anna", "x", 400, "no body"},
		{"POST", "/podcheckpoint/shop/nginx", "anna", "", 404, "anna wants shop/nginx"},
	} {
		resp, b, err := ask(t, s, tt.method, tt.path, tt.user, strings.NewReader(tt.body))
		if err != nil || resp.StatusCode != tt.status || !strings.Contains(string(b), tt.text) {
			t.Errorf("%s %s by %q: %d %s, %v; want %d with %q", tt.method, tt.path, tt.user, resp.StatusCode, b, err, tt.status, tt.text)
		}
		var e wire.Error
		if err := wire.Unmarshal(b, &e); err != nil || e.Code == "" {
			t.Errorf("%s %s: %s: %v", tt.method, tt.path, b, err)
		}
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/podcheckpoint/shop/redis", nil)
	r.Header.Set("User", "anna")
	if s.Config.Handler.ServeHTTP(w, r); w.Code != http.StatusForbidden {
		t.Errorf("without TLS: %d", w.Code)
	}
}

// An error that comes before the first byte is one that the client can read.
func TestRuntimeThatWritesNothing(t *testing.T) {
	s, _ := serve(t, func(_ context.Context, dir string) error {
		return os.WriteFile(filepath.Join(dir, cri.PodStream), nil, 0o600)
	})
	resp, b, err := ask(t, s, http.MethodPost, "/podcheckpoint/shop/redis", "anna", nil)
	if err != nil || resp.StatusCode != 500 || !strings.Contains(string(b), "has not written manifest.json") {
		t.Errorf("%s: %s, %v", resp.Status, b, err)
	}
}

// What goes wrong after the first byte cuts the connection: the client must not take what
// it got for all there is.
func TestCut(t *testing.T) {
	// More than the connection holds.
	const size = 64 << 20
	var stream *os.File
	s, _ := serve(t, func(_ context.Context, dir string) (err error) {
		if err := written(dir, nil, []byte("{}")); err != nil {
			return err
		}
		if stream, err = os.OpenFile(filepath.Join(dir, cri.PodStream), os.O_WRONLY, 0); err != nil {
			return err
		}
		return stream.Truncate(size)
	})
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+"/podcheckpoint/shop/redis", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("User", "anna")
	resp, err := s.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := errors.Join(stream.Truncate(0), stream.Close()); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) || n >= size {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// One at a time of a pod, also while it is sent; and not too many at once.
func TestOneAtATime(t *testing.T) {
	inside, out := make(chan struct{}), make(chan struct{})
	s, _ := serve(t, func(_ context.Context, dir string) error {
		inside <- struct{}{}
		<-out
		return written(dir, []byte("s"), []byte("{}"))
	})
	done := make(chan int)
	go func() {
		resp, _, err := ask(t, s, http.MethodPost, "/podcheckpoint/shop/redis", "anna", nil)
		if err != nil {
			t.Error(err)
		}
		done <- resp.StatusCode
	}()
	<-inside
	if resp, b, _ := ask(t, s, http.MethodPost, "/podcheckpoint/shop/redis", "anna", nil); resp.StatusCode != 409 || !strings.Contains(string(b), "is being taken or sent") {
		t.Errorf("a second one: %s %s", resp.Status, b)
	}
	close(out)
	if code := <-done; code != http.StatusOK {
		t.Errorf("the first one: %d", code)
	}
	h := s.Config.Handler.(*Server)
	for _, pod := range []string{"a", "b", "c", "d"} {
		if err := h.enter(call{namespace: "ns", pod: pod}); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.enter(call{namespace: "ns", pod: "e"}); wire.CodeOf(err) != wire.CodeTooMany {
		t.Error(err)
	}
}

// A client that has gone is noticed while the checkpoint is taken.
func TestClientGoes(t *testing.T) {
	ended := make(chan struct{})
	inside := make(chan struct{})
	s, _ := serve(t, func(ctx context.Context, _ string) error {
		close(inside)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL+"/podcheckpoint/shop/redis", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("User", "anna")
	go func() { <-inside; cancel() }()
	if _, err := s.Client().Do(r); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-ended
}

func TestClear(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "podcheckpoints")
	if err := Clear(dir); err != nil {
		t.Errorf("without any: %v", err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "pod-1"), 0o700), written(filepath.Join(dir, "pod-1"), nil, nil), Clear(dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error(err)
	}
}
