package wire

import (
	"fmt"
	"strings"
)

const (
	// Version is the version that this package speaks.
	Version = "v1alpha1"
	// Root is the path below which every version lives. A server registers it with
	// and without the final slash.
	Root = "/migration/"
	// PodCheckpoints is the path below which a kubelet serves checkpoints of its pods to
	// administrators, as NAMESPACE/POD. It is not a part of what kubelets say to each
	// other, but its errors look the same.
	PodCheckpoints = "/podcheckpoint/"
)

// SupportedVersions are the versions that a server of this package answers, best first.
var SupportedVersions = []string{Version}

// Verb is the last part of a path.
type Verb string

// The verbs. Open, Status and Abort have the same path and differ in the method.
const (
	VerbOpen    Verb = "open"
	VerbStatus  Verb = "status"
	VerbAbort   Verb = "abort"
	VerbStream  Verb = "stream"
	VerbFreeze  Verb = "freeze"
	VerbCommit  Verb = "commit"
	VerbDone    Verb = "done"
	VerbFailed  Verb = "failed"
	VerbOutcome Verb = "outcome"
)

// methods has every verb. The empty segment stands for the session itself.
var methods = map[Verb]struct{ method, segment string }{
	VerbOpen:    {"POST", ""},
	VerbStatus:  {"GET", ""},
	VerbAbort:   {"DELETE", ""},
	VerbStream:  {"GET", "stream"},
	VerbFreeze:  {"POST", "freeze"},
	VerbCommit:  {"POST", "commit"},
	VerbDone:    {"POST", "done"},
	VerbFailed:  {"POST", "failed"},
	VerbOutcome: {"GET", "outcome"},
}

// Verbs are all verbs in the order of a migration.
func Verbs() []Verb {
	return []Verb{VerbOpen, VerbStatus, VerbStream, VerbFreeze, VerbCommit, VerbDone, VerbFailed, VerbAbort, VerbOutcome}
}

// Method is the HTTP method of a verb.
func (v Verb) Method() string { return methods[v].method }

// Session says which session of which pod a request is about.
type Session struct {
	Namespace string
	// Pod is the source pod, and for VerbOutcome the clone.
	Pod string
	// ID is the UID of the clone pod.
	ID string
}

// Path is the path of a verb for this session. It is meant for sessions that Validate.
func (s Session) Path(v Verb) string {
	p := fmt.Sprintf("%s%s/namespaces/%s/pods/%s/sessions/%s", Root, Version, s.Namespace, s.Pod, s.ID)
	if seg := methods[v].segment; seg != "" {
		p += "/" + seg
	}
	return p
}

// Validate reports the first part that cannot be what it should be.
func (s Session) Validate() error {
	switch {
	case !isLabel(s.Namespace):
		return Errorf(CodeBadRequest, "%q is not the name of a namespace", s.Namespace)
	case !isSubdomain(s.Pod):
		return Errorf(CodeBadRequest, "%q is not the name of a pod", s.Pod)
	case !isUID(s.ID):
		return Errorf(CodeBadRequest, "%q is not the UID of a pod", s.ID)
	}
	return nil
}

// ParsePath is the inverse of Path. Its errors are of type *Error: CodeUnknownVersion,
// CodeUnknownPath, CodeBadMethod or CodeBadRequest.
func ParsePath(method, path string) (Verb, Session, error) {
	rest, ok := strings.CutPrefix(path, Root)
	if !ok {
		return "", Session{}, Errorf(CodeUnknownPath, "the path %q is not a migration path", clip(path))
	}
	version, rest, _ := strings.Cut(rest, "/")
	if version != Version {
		return "", Session{}, unknownVersion(version)
	}
	p := strings.Split(rest, "/")
	if len(p) < 6 || len(p) > 7 || p[0] != "namespaces" || p[2] != "pods" || p[4] != "sessions" {
		return "", Session{}, Errorf(CodeUnknownPath, "the path %q is not a migration path", clip(path))
	}
	s := Session{Namespace: p[1], Pod: p[3], ID: p[5]}
	segment := ""
	if len(p) > 6 {
		if segment = p[6]; segment == "" {
			return "", Session{}, Errorf(CodeUnknownPath, "the path %q is not a migration path", clip(path))
		}
	}
	if err := s.Validate(); err != nil {
		return "", Session{}, err
	}
	known := false
	for _, v := range Verbs() {
		if m := methods[v]; m.segment == segment {
			known = true
			if m.method == method {
				return v, s, nil
			}
		}
	}
	if known {
		return "", Session{}, Errorf(CodeBadMethod, "the method %q is not served on this path", clip(method))
	}
	return "", Session{}, Errorf(CodeUnknownPath, "the path %q is not a migration path", clip(path))
}

func unknownVersion(v string) *Error {
	e := Errorf(CodeUnknownVersion, "this kubelet does not speak version %q of the migration protocol", clip(v))
	e.Cure = "run kubelets on both nodes that share one of the supported versions"
	e.Details = map[string]string{"supported": strings.Join(SupportedVersions, ",")}
	return e
}

// clip keeps what a stranger sent from filling logs and answers.
func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}

func isAlnum(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

// isLabel: a DNS-1123 label.
func isLabel(s string) bool {
	if len(s) == 0 || len(s) > 63 || !isAlnum(s[0]) || !isAlnum(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && s[i] != '-' {
			return false
		}
	}
	return true
}

// isSubdomain: a DNS-1123 subdomain.
func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for l := range strings.SplitSeq(s, ".") {
		// Labels of a pod name may be longer than 63 in Kubernetes.
		if len(l) == 0 || !isAlnum(l[0]) || !isAlnum(l[len(l)-1]) || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}

// isUID: what the API server and the kubelet (for static pods) make as UIDs.
func isUID(s string) bool {
	if len(s) < 8 || len(s) > 64 || !isAlnum(s[0]) || !isAlnum(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && s[i] != '-' {
			return false
		}
	}
	return true
}
