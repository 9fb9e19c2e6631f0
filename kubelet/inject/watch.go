//go:build podmig_patched

package inject

import (
	"context"
	"net/http"
	"strings"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/kubernetes/pkg/kubelet/server"

	"podmig.dev/podmig/kubelet/wire"
)

// watched is the kubelet's authentication and authorisation, and tells whom they
// refuse at the migration endpoint. The kubelet keeps that to itself.
type watched struct {
	server.AuthInterface
	refused func(user, remote string, e *wire.Error)
}

func (w *watched) AuthenticateRequest(r *http.Request) (*authenticator.Response, bool, error) {
	resp, ok, err := w.AuthInterface.AuthenticateRequest(r)
	if (err != nil || !ok) && strings.HasPrefix(r.URL.Path, server.MigrationPath) {
		e := wire.Errorf(wire.CodeUnknownCaller, "the caller is not authenticated")
		if err != nil {
			e.Message += ": " + err.Error()
		}
		w.refused("", r.RemoteAddr, e)
	}
	return resp, ok, err
}

// from are attributes that know where the request came from.
type from struct {
	authorizer.Attributes
	remote string
}

func (w *watched) GetRequestAttributes(ctx context.Context, u user.Info, r *http.Request) []authorizer.Attributes {
	all := w.AuthInterface.GetRequestAttributes(ctx, u, r)
	if strings.HasPrefix(r.URL.Path, server.MigrationPath) {
		for i, a := range all {
			all[i] = from{a, r.RemoteAddr}
		}
	}
	return all
}

func (w *watched) Authorize(ctx context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	f, migration := a.(from)
	if migration {
		a = f.Attributes
	}
	decision, reason, err := w.AuthInterface.Authorize(ctx, a)
	if migration && decision != authorizer.DecisionAllow {
		e := wire.Errorf(wire.CodeForbidden, "the user may not %s %s/%s", a.GetVerb(), a.GetResource(), a.GetSubresource())
		if err != nil {
			e.Message += ": " + err.Error()
		}
		w.refused(a.GetUser().GetName(), f.remote, e)
	}
	return decision, reason, err
}
