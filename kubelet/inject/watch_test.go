//go:build podmig_patched

package inject

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/kubernetes/pkg/kubelet/server"

	"podmig.dev/podmig/kubelet/wire"
)

// authority knows users by their header and lets "node" do everything.
type authority struct{ server.AuthInterface }

func (authority) AuthenticateRequest(r *http.Request) (*authenticator.Response, bool, error) {
	switch name := r.Header.Get("User"); name {
	case "":
		return nil, false, nil
	case "forged":
		return nil, false, errors.New("unknown authority")
	default:
		return &authenticator.Response{User: &user.DefaultInfo{Name: name}}, true, nil
	}
}

func (authority) GetRequestAttributes(_ context.Context, u user.Info, r *http.Request) []authorizer.Attributes {
	return []authorizer.Attributes{authorizer.AttributesRecord{User: u, Verb: "create", Resource: "nodes", Subresource: "migration", Path: r.URL.Path}}
}

func (authority) Authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	if _, ok := a.(authorizer.AttributesRecord); !ok {
		return authorizer.DecisionDeny, "", fmt.Errorf("attributes of another kind: %T", a)
	}
	switch a.GetUser().GetName() {
	case "node":
		return authorizer.DecisionAllow, "", nil
	case "unlucky":
		return authorizer.DecisionNoOpinion, "", errors.New("no answer")
	}
	return authorizer.DecisionNoOpinion, "", nil
}

func TestRefusalsInFrontAreReported(t *testing.T) {
	tests := []struct {
		name, user, path string
		allowed          bool
		want             []string
	}{
		{"nobody", "", "/migration/v1", false, []string{"|1.2.3.4:5|unknown-caller|the caller is not authenticated"}},
		{"a forged certificate", "forged", "/migration/v1", false, []string{"|1.2.3.4:5|unknown-caller|the caller is not authenticated: unknown authority"}},
		{"without the right", "eve", "/migration/v1", false, []string{"eve|1.2.3.4:5|forbidden|the user may not create nodes/migration"}},
		{"no answer", "unlucky", "/migration/v1", false, []string{"unlucky|1.2.3.4:5|forbidden|the user may not create nodes/migration: no answer"}},
		{"with the right", "node", "/migration/v1", true, nil},
		{"nobody, elsewhere", "", "/pods", false, nil},
		{"without the right, elsewhere", "eve", "/pods", false, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			w := &watched{authority{}, func(user, remote string, e *wire.Error) {
				got = append(got, fmt.Sprintf("%s|%s|%s|%s", user, remote, e.Code, e.Message))
			}}
			r := httptest.NewRequest(http.MethodPost, tt.path, nil)
			r.RemoteAddr = "1.2.3.4:5"
			r.Header.Set("User", tt.user)
			// The way of the kubelet's filter.
			allowed := false
			if resp, ok, err := w.AuthenticateRequest(r); err == nil && ok {
				for _, a := range w.GetRequestAttributes(t.Context(), resp.User, r) {
					decision, _, _ := w.Authorize(t.Context(), a)
					allowed = allowed || decision == authorizer.DecisionAllow
				}
			}
			if allowed != tt.allowed || !slices.Equal(got, tt.want) {
				t.Errorf("allowed %t, reported %q; want %t, %q", allowed, got, tt.allowed, tt.want)
			}
		})
	}
}
