//go:build podmig_patched

package inject

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/kubernetes/pkg/kubelet/server"

	"podmig.dev/podmig/kubelet/wire"
)

// The two ends of the hook name the same paths.
func TestPaths(t *testing.T) {
	if server.MigrationPath != wire.Root || server.PodCheckpointPath != wire.PodCheckpoints {
		t.Errorf("%q and %q, the handlers know %q and %q", server.MigrationPath, server.PodCheckpointPath, wire.Root, wire.PodCheckpoints)
	}
}

// What a request has to be allowed is what it is served as: nodes have nodes/migration,
// and the memory of a pod must not be had with it.
func TestRightAndHandlerAgree(t *testing.T) {
	served := ""
	is := func(name string) http.Handler {
		return http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served = name })
	}
	h := routes{migrations: is("migration"), checkpoints: is("checkpoint")}
	for path, right := range map[string]string{
		"/podcheckpoint/ns/pod":                 "checkpoint",
		"/podcheckpoint/":                       "checkpoint",
		"/podcheckpoint/../migration/v1alpha1":  "checkpoint",
		"/migration/v1alpha1":                   "migration",
		"/migration/":                           "migration",
		"/migration/../podcheckpoint/ns/pod":    "migration",
		"/migration/podcheckpoint/ns/pod":       "migration",
		"/migration//podcheckpoint/ns/pod":      "migration",
		"/podcheckpoint/ns/pod/migration/x":     "checkpoint",
		"/podcheckpoint/%2e%2e/migration/x/y/z": "checkpoint",
	} {
		r := httptest.NewRequest(http.MethodPost, path, nil)
		attrs := server.NewNodeAuthorizerAttributesGetter("node").GetRequestAttributes(t.Context(), &user.DefaultInfo{Name: "u"}, r)
		if len(attrs) != 1 || attrs[0].GetSubresource() != right || attrs[0].GetVerb() != "create" || attrs[0].GetResource() != "nodes" {
			t.Errorf("%s needs %+v, want %s", path, attrs, right)
		}
		if h.ServeHTTP(httptest.NewRecorder(), r); served != right {
			t.Errorf("%s is served as %s, allowed as %s", path, served, right)
		}
	}
}
