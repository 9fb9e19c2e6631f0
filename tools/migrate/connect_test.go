package migrate

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// twoContexts writes a kubeconfig with contexts one (of namespace shop) and two.
func twoContexts(t *testing.T, one, two string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	text := `{apiVersion: v1, kind: Config, current-context: one,
clusters: [{name: one, cluster: {server: "` + one + `"}}, {name: two, cluster: {server: "` + two + `"}}],
contexts: [{name: one, context: {cluster: one, user: u, namespace: shop}}, {name: two, context: {cluster: two, user: u}}],
users: [{name: u, user: {}}]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// apiServer remembers what it is asked beside discovery, and has node1 and nothing else.
type apiServer struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string
}

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{}
	resources := func(groupVersion string, r ...metav1.APIResource) runtime.Object {
		for i := range r {
			r[i].Verbs = metav1.Verbs{"get", "list", "watch", "create", "patch"}
		}
		return &metav1.APIResourceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIResourceList"}, GroupVersion: groupVersion, APIResources: r}
	}
	group := func(name, version string) metav1.APIGroup {
		v := metav1.GroupVersionForDiscovery{GroupVersion: name + "/" + version, Version: version}
		return metav1.APIGroup{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroup"}, Name: name, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v}
	}
	policy, podmig := group("policy", "v1"), group("podmig.dev", "v1alpha1")
	discovery := map[string]runtime.Object{
		"/api":                      &metav1.APIVersions{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIVersions"}, Versions: []string{"v1"}},
		"/apis":                     &metav1.APIGroupList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroupList"}, Groups: []metav1.APIGroup{policy, podmig}},
		"/apis/policy":              &policy,
		"/apis/podmig.dev":          &podmig,
		"/api/v1":                   resources("v1", metav1.APIResource{Name: "pods", Kind: "Pod", Namespaced: true}, metav1.APIResource{Name: "nodes", Kind: "Node"}),
		"/apis/policy/v1":           resources("policy/v1", metav1.APIResource{Name: "poddisruptionbudgets", Kind: "PodDisruptionBudget", Namespaced: true}),
		"/apis/podmig.dev/v1alpha1": resources("podmig.dev/v1alpha1", metav1.APIResource{Name: "podmigrations", Kind: "PodMigration", Namespaced: true}),
	}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		answer := discovery[r.URL.Path]
		// A watch may come when the command is over already.
		if answer == nil && r.URL.Query().Get("watch") == "" {
			s.mu.Lock()
			s.asked = append(s.asked, r.Method+" "+r.URL.Path)
			s.mu.Unlock()
		}
		switch {
		case answer != nil:
		case r.Method == http.MethodPost:
			// The object comes back as it is.
			if _, err := io.Copy(w, r.Body); err != nil {
				t.Error(err)
			}
			return
		case r.URL.Query().Get("watch") != "":
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		case strings.HasSuffix(r.URL.Path, "/nodes/node1"):
			answer = &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "node1"}}
		case strings.HasSuffix(r.URL.Path, "/pods"):
			answer = &corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
		case strings.HasSuffix(r.URL.Path, "/poddisruptionbudgets"):
			answer = &policyv1.PodDisruptionBudgetList{TypeMeta: metav1.TypeMeta{APIVersion: "policy/v1", Kind: "PodDisruptionBudgetList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
		case strings.HasSuffix(r.URL.Path, "/podmigrations"):
			answer = &v1alpha1.PodMigrationList{TypeMeta: metav1.TypeMeta{APIVersion: "podmig.dev/v1alpha1", Kind: "PodMigrationList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
		default:
			http.NotFound(w, r)
			return
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// took is what it was asked since the last time.
func (s *apiServer) took() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.asked = nil }()
	return strings.Join(s.asked, "\n")
}

// The flags that say where a pod is are not just read: what they say is what is asked of
// which API server.
func TestFlagsReachTheAPI(t *testing.T) {
	one, two := newAPIServer(t), newAPIServer(t)
	t.Setenv("KUBECONFIG", twoContexts(t, one.URL, two.URL))
	other := twoContexts(t, two.URL, one.URL)
	orders := func(namespace string) string {
		return "POST /apis/podmig.dev/v1alpha1/namespaces/" + namespace + "/podmigrations"
	}
	for _, tt := range []struct {
		args string
		at   *apiServer
		want []string
		not  string
	}{
		{"redis", one, []string{orders("shop")}, ""},
		{"redis -n web", one, []string{orders("web")}, ""},
		{"redis --namespace web", one, []string{orders("web")}, ""},
		{"redis --namespace=web node2", one, []string{orders("web")}, ""},
		{"redis --context two", two, []string{orders("default")}, ""},
		{"redis --context two -n web", two, []string{orders("web")}, ""},
		{"redis --kubeconfig " + other, two, []string{orders("shop")}, ""},
		{"redis --kubeconfig " + other + " --context two --namespace web", one, []string{orders("web")}, ""},
		{"--from node1", one, []string{"GET /api/v1/pods", "GET /apis/podmig.dev/v1alpha1/podmigrations", "PATCH /api/v1/nodes/node1"}, "namespaces/"},
		{"--from node1 -n web --context two", two, []string{"GET /api/v1/namespaces/web/pods", "GET /apis/policy/v1/namespaces/web/poddisruptionbudgets"}, "/api/v1/pods"},
	} {
		var out, errOut bytes.Buffer
		cmd := Command(&out, &errOut)
		cmd.SetArgs(append(strings.Fields(tt.args), "--no-wait"))
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Errorf("%s: %v", tt.args, err)
		}
		asked := tt.at.took()
		contains(t, asked, tt.want...)
		if tt.not != "" && strings.Contains(asked, tt.not) {
			t.Errorf("%s: it asked\n%s", tt.args, asked)
		}
		if rest := one.took() + two.took(); rest != "" {
			t.Errorf("%s: it asked the other one\n%s", tt.args, rest)
		}
	}
}
