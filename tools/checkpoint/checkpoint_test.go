package checkpoint

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/wire"
)

// stream is a small checkpoint and its manifest.
func stream(t *testing.T) (stream, manifest []byte) {
	t.Helper()
	var b bytes.Buffer
	w, err := checkpoint.NewWriter(&b, cri.PodSession)
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Begin(checkpoint.Part{Kind: checkpoint.KindImage, Container: "main", Name: "inventory.img"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Data(0, []byte("secret")), p.Close(), w.Round(checkpoint.Round{Final: true})); err != nil {
		t.Fatal(err)
	}
	m := &checkpoint.Manifest{FrozenAt: 1, Containers: []checkpoint.Container{{Name: "main", ImageID: "sha256:1"}, {Name: "sidecar", ImageID: "sha256:2"}}}
	if _, err := w.Finish(m); err != nil {
		t.Fatal(err)
	}
	manifest, err = json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), manifest
}

// file is one of an archive.
type file struct {
	name string
	data []byte
}

func archive(t *testing.T, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o600, Size: int64(len(f.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func valid(t *testing.T) []byte {
	s, m := stream(t)
	return archive(t, file{cri.PodStream, s}, file{cri.PodManifest, m})
}

func TestVerify(t *testing.T) {
	s, m := stream(t)
	b := valid(t)
	got, err := verify(bytes.NewReader(b))
	sum := sha256.Sum256(b)
	if err != nil || got.bytes != int64(len(b)) || got.digest != hex.EncodeToString(sum[:]) || !slices.Equal(got.containers, []string{"main", "sidecar"}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, tt := range []struct {
		name string
		b    []byte
		text string
	}{
		{"nothing", nil, "there is no checkpoint.stream"},
		{"no manifest", archive(t, file{cri.PodStream, s}), "there is no manifest.json"},
		{"the manifest first", archive(t, file{cri.PodManifest, m}, file{cri.PodStream, s}), "in the place of checkpoint.stream"},
		{"more", archive(t, file{cri.PodStream, s}, file{cri.PodManifest, m}, file{"x", nil}), `"x" behind the manifest`},
		{"another manifest", archive(t, file{cri.PodStream, s}, file{cri.PodManifest, append(slices.Clone(m), ' ')}), "not the manifest of the stream"},
		{"a longer stream", archive(t, file{cri.PodStream, append(slices.Clone(s), 0)}, file{cri.PodManifest, m}), "its stream"},
		{"bytes behind it", append(slices.Clone(b), 0), "1 bytes are behind"},
	} {
		if _, err := verify(bytes.NewReader(tt.b)); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	for n := 0; n < len(b)-2*512; n += 100 {
		if _, err := verify(bytes.NewReader(b[:n])); err == nil {
			t.Errorf("cut off after %d bytes it is whole", n)
		}
	}
	// In a file's content every byte counts; headers have a sum of their own.
	for n := 512; n < 512+len(s); n += 7 {
		bad := slices.Clone(b)
		bad[n] ^= 0x40
		if _, err := verify(bytes.NewReader(bad)); err == nil {
			t.Errorf("with byte %d changed it is right", n)
		}
	}
}

// cluster is an API server with pods redis (on node1) and new (on no node), whose node
// answers as the test says. It remembers what it is asked.
type cluster struct {
	*httptest.Server
	answer http.HandlerFunc
	asked  []string
	dir    string
}

func newCluster(t *testing.T, answer http.HandlerFunc) *cluster {
	c := &cluster{answer: answer, dir: t.TempDir()}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.asked = append(c.asked, r.Method+" "+r.URL.Path)
		send := func(v any) {
			w.Header().Set("Content-Type", "application/json")
			if err := json.NewEncoder(w).Encode(v); err != nil {
				t.Error(err)
			}
		}
		pod := func(namespace, name, node string, phase corev1.PodPhase) corev1.Pod {
			return corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
				Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase}}
		}
		_, rest, _ := strings.Cut(r.URL.Path, "/namespaces/")
		namespace, name, _ := strings.Cut(rest, "/pods/")
		switch {
		case strings.Contains(r.URL.Path, "/proxy/"):
			c.answer(w, r)
		case strings.HasSuffix(r.URL.Path, "/pods"):
			send(corev1.PodList{Items: []corev1.Pod{pod("shop", "redis", "node1", corev1.PodRunning), pod("shop", "new", "", corev1.PodPending)}})
		case strings.HasSuffix(r.URL.Path, "/namespaces"):
			send(corev1.NamespaceList{Items: []corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}}})
		case name == "redis":
			send(pod(namespace, name, "node1", corev1.PodRunning))
		case name == "new":
			send(pod(namespace, name, "", corev1.PodPending))
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			s := apierrors.NewNotFound(corev1.Resource("pods"), name).Status()
			s.Kind, s.APIVersion = "Status", "v1"
			send(s)
		}
	}))
	t.Cleanup(c.Close)
	config := filepath.Join(t.TempDir(), "config")
	text := `{apiVersion: v1, kind: Config, current-context: one, clusters: [{name: one, cluster: {server: "` + c.URL + `"}}],
contexts: [{name: one, context: {cluster: one, user: u, namespace: shop}}], users: [{name: u, user: {}}]}`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", config)
	return c
}

// run calls the plugin in the cluster's folder.
func (c *cluster) run(t *testing.T, args string) (out, errOut string, err error) {
	t.Helper()
	t.Chdir(c.dir)
	var o, e bytes.Buffer
	cmd := Command(&o, &e)
	cmd.SetArgs(strings.Fields(args))
	err = cmd.ExecuteContext(t.Context())
	return o.String(), e.String(), err
}

// files are those of the cluster's folder.
func (c *cluster) files(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func sends(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b)
	}
}

func TestDownload(t *testing.T) {
	b := valid(t)
	c := newCluster(t, sends(b))
	out, progress, err := c.run(t, "redis redis.tar")
	if err != nil || out != "redis.tar\n" || !strings.Contains(progress, "the pod runs on") || !strings.Contains(progress, "/s\n") {
		t.Fatalf("%q, %q, %v", out, progress, err)
	}
	st, err := os.Stat("redis.tar")
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if got, err := os.ReadFile("redis.tar"); err != nil || !bytes.Equal(got, b) {
		t.Errorf("it has %d bytes, %v", len(got), err)
	}
	if want := []string{"GET /api/v1/namespaces/shop/pods/redis", "POST /api/v1/nodes/node1/proxy/podcheckpoint/shop/redis"}; !slices.Equal(c.asked, want) {
		t.Errorf("it asked %q", c.asked)
	}

	// What is there stays, and the cluster is not asked.
	c.asked = nil
	if _, _, err := c.run(t, "redis redis.tar"); err == nil || !strings.Contains(err.Error(), "redis.tar exists") || ExitCode(err) != 1 || len(c.asked) > 0 {
		t.Errorf("%v, it asked %q", err, c.asked)
	}
	out, _, err = c.run(t, "redis redis.tar --force -o json -n web")
	if err != nil {
		t.Fatal(err)
	}
	var r report
	sum := sha256.Sum256(b)
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Path != "redis.tar" || r.Bytes != int64(len(b)) || r.Node != "node1" ||
		!slices.Equal(r.Containers, []string{"main", "sidecar"}) || r.Digest != "sha256:"+hex.EncodeToString(sum[:]) {
		t.Errorf("%s, %v", out, err)
	}
	if c.asked[1] != "POST /api/v1/nodes/node1/proxy/podcheckpoint/web/redis" {
		t.Errorf("it asked %q", c.asked)
	}
	if files := c.files(t); !slices.Equal(files, []string{"redis.tar"}) {
		t.Errorf("files: %q", files)
	}
}

func TestPlace(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := errors.Join(os.Mkdir("dir", 0o700), os.WriteFile("file", nil, 0o600), os.Symlink("file", "link"), os.Symlink("gone", "dangling")); err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 21, 20, 3, 31, 0, time.FixedZone("", 3600))
	for _, tt := range []struct{ path, want, text string }{
		{"new.tar", "new.tar", ""},
		{"dir/new.tar", "dir/new.tar", ""},
		{"dir", "dir/redis-20261121T190331Z.tar", ""},
		{"dir/", "dir/redis-20261121T190331Z.tar", ""},
		{".", "redis-20261121T190331Z.tar", ""},
		{"gone/", "", "there is no directory gone/: make it first"},
		{"gone/new.tar", "", "there is no directory gone: make it first"},
		{"file", "", "file exists"},
		{"link", "", "no regular file"},
		{"dangling", "", "no regular file"},
		{"file/new.tar", "", "not a directory"},
		{"/dev/null", "", "no regular file"},
	} {
		got, err := place(tt.path, "redis", now)
		if err == nil {
			err = vacant(got, false)
		}
		if tt.text == "" && (err != nil || got != tt.want) || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
			t.Errorf("%s: %q, %v; want %q, %q", tt.path, got, err, tt.want, tt.text)
		}
	}
	if err := errors.Join(vacant("file", true), vacant("new.tar", true)); err != nil {
		t.Error(err)
	}
	if vacant("/dev/null", true) == nil || vacant("link", true) == nil {
		t.Error("force replaces what is no regular file")
	}
	// A file that comes while the checkpoint is downloaded stays, too.
	if err := os.WriteFile("temporary", []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := name("temporary", "file", false); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Error(err)
	}
	if b, err := os.ReadFile("file"); err != nil || len(b) > 0 {
		t.Errorf("it was replaced: %q, %v", b, err)
	}
}

// Whatever goes wrong, what was there is there, and nothing else.
func TestFailures(t *testing.T) {
	b := valid(t)
	says := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); fmt.Fprint(w, text) }
	}
	kubelet := func(code wire.Code, message, cure string) http.HandlerFunc {
		text, err := wire.Encode(&wire.Error{Code: code, Message: message, Cure: cure})
		if err != nil {
			t.Fatal(err)
		}
		return says(code.HTTPStatus(), string(text))
	}
	cut := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b[:1000])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	bad := slices.Clone(b)
	bad[600] ^= 1
	for _, tt := range []struct {
		name, args string
		answer     http.HandlerFunc
		code       int
		text       string
	}{
		{"no pod", "nobody x.tar", nil, 3, `pods "nobody" not found`},
		{"no node", "new x.tar", nil, 3, "is on no node yet"},
		{"no path", "redis", nil, 1, "name a pod and a file"},
		{"output", "redis x.tar -o yaml", nil, 1, "give json or nothing"},
		{"no directory", "redis gone/x.tar", nil, 1, "make it first"},
		{"refused", "redis x.tar", kubelet(wire.CodeBusy, "pod redis is moving", "wait"), 3, "pod redis is moving; wait"},
		{"failed", "redis x.tar", kubelet(wire.CodeRuntime, "CRIU failed", ""), 1, "node node1: CRIU failed"},
		{"no podmig", "redis x.tar", says(404, "404 page not found\n"), 3, "node node1 serves no checkpoints of pods: run a kubelet with podmig"},
		{"no right of the API server", "redis x.tar", says(403, "Forbidden (user=kube-apiserver)"), 3, "grant its user nodes/checkpoint"},
		{"no right", "redis x.tar", says(403, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"nodes \"node1\" is forbidden: User \"eve\" cannot create resource \"nodes/proxy\"","code":403}`), 3, `"eve" cannot create resource "nodes/proxy"`},
		{"no way", "redis x.tar", says(503, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"error trying to reach service","code":503}`), 1, "error trying to reach service"},
		{"strange", "redis x.tar", says(500, "oh"), 1, "status 500: oh"},
		{"empty", "redis x.tar", sends(nil), 1, "status 200"},
		{"changed", "redis x.tar", sends(bad), 1, "what was received is no checkpoint"},
		{"short", "redis x.tar", sends(b[:len(b)-2048]), 1, "what was received is no checkpoint"},
		{"cut off", "redis x.tar", cut, 1, fmt.Sprintf("after 1000 of %d bytes of the checkpoint: unexpected EOF", len(b))},
		{"cut off, with force", "redis old.tar --force", cut, 1, "unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t, tt.answer)
			if err := os.WriteFile(filepath.Join(c.dir, "old.tar"), []byte("old"), 0o644); err != nil {
				t.Fatal(err)
			}
			out, _, err := c.run(t, tt.args)
			if err == nil || ExitCode(err) != tt.code || !strings.Contains(err.Error(), tt.text) || out != "" {
				t.Errorf("%q, code %d, %v; want %d with %q", out, ExitCode(err), err, tt.code, tt.text)
			}
			if files := c.files(t); !slices.Equal(files, []string{"old.tar"}) {
				t.Errorf("files: %q", files)
			}
			if text, err := os.ReadFile(filepath.Join(c.dir, "old.tar")); err != nil || string(text) != "old" {
				t.Errorf("what was there is %q, %v", text, err)
			}
		})
	}
}

func TestComplete(t *testing.T) {
	newCluster(t, nil)
	for _, tt := range []struct{ args, want string }{
		{" ", "redis :4"},
		{"redis ", ":0"},
		{"redis file ", ":4"},
		{"-n ", "shop :4"},
		{"--context ", "one :4"},
		{"redis file -o ", "json :4"},
	} {
		var out, errOut bytes.Buffer
		if err := Complete(&out, &errOut, strings.Split(strings.TrimPrefix(tt.args, " "), " ")); err != nil {
			t.Errorf("%q: %v", tt.args, err)
		}
		if got := strings.Join(strings.Fields(out.String()), " "); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.args, got, tt.want)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1 << 20: "1.0 MiB", 5 << 30: "5.0 GiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
