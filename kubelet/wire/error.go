package wire

import (
	"errors"
	"fmt"
	"strings"
)

// Code is the stable name of an error. Codes are never reused for something else.
type Code string

// Codes about the request itself.
const (
	CodeBadRequest     Code = "bad-request"
	CodeTooLarge       Code = "too-large"
	CodeBadMediaType   Code = "bad-media-type"
	CodeBadMethod      Code = "bad-method"
	CodeUnknownPath    Code = "unknown-path"
	CodeUnknownVersion Code = "unknown-version"
	CodeInsecure       Code = "insecure"
	CodeUnknownCaller  Code = "unknown-caller"
	CodeForbidden      Code = "forbidden"
	CodeTooMany        Code = "too-many"
)

// Codes about the pod, in the answer to open.
const (
	// CodeDisabled: the feature gate is off on this node.
	CodeDisabled Code = "disabled"
	// CodeUnknownPod: no such pod on this node, or one with another UID.
	CodeUnknownPod Code = "unknown-pod"
	CodeNotRunning Code = "not-running"
	// CodeBusy: another session has the pod.
	CodeBusy Code = "busy"
	// CodeMismatch: images, containers or volumes of the two pods differ.
	CodeMismatch Code = "mismatch"
	// CodePreflight: the findings name what prevents a checkpoint.
	CodePreflight Code = "preflight"
	// CodeIncompatible: the nodes differ in something a process would notice.
	CodeIncompatible Code = "incompatible"
	// CodeNoRuntime: the runtime does not have the migration extension.
	CodeNoRuntime Code = "no-runtime"
	// CodeNoMemory: the target has too little memory.
	CodeNoMemory Code = "no-memory"
)

// Codes about a session.
const (
	CodeUnknownSession Code = "unknown-session"
	// CodeWrongState: not now; the message names the state.
	CodeWrongState Code = "wrong-state"
	// CodeAborted: the migration ended before the commit, the source runs.
	CodeAborted Code = "aborted"
	// CodeGivenAway: the target owns the pod.
	CodeGivenAway Code = "given-away"
	// CodeReturned: the source owns the pod again.
	CodeReturned Code = "returned"
	// CodeReleased: the source was stopped for good.
	CodeReleased Code = "released"
	// CodeNotDurable: the journal could not be written; nothing was given away.
	CodeNotDurable Code = "not-durable"
	// CodeRuntime: the runtime failed; the message has its words.
	CodeRuntime Code = "runtime"
	// CodeDeadline: the server stopped waiting.
	CodeDeadline Code = "deadline"
	// CodeUnavailable: try again later, nothing was done.
	CodeUnavailable Code = "unavailable"
	CodeInternal    Code = "internal"
)

var statuses = map[Code]int{
	CodeBadRequest: 400, CodeTooLarge: 413, CodeBadMediaType: 415, CodeBadMethod: 405,
	CodeUnknownPath: 404, CodeUnknownVersion: 404, CodeInsecure: 403, CodeUnknownCaller: 401,
	CodeForbidden: 403, CodeTooMany: 429,

	CodeDisabled: 403, CodeUnknownPod: 404, CodeNotRunning: 409, CodeBusy: 409, CodeMismatch: 422,
	CodePreflight: 422, CodeIncompatible: 422, CodeNoRuntime: 501, CodeNoMemory: 422,

	CodeUnknownSession: 404, CodeWrongState: 409, CodeAborted: 409, CodeGivenAway: 409,
	CodeReturned: 409, CodeReleased: 409, CodeNotDurable: 500, CodeRuntime: 500, CodeDeadline: 504,
	CodeUnavailable: 503, CodeInternal: 500,
}

// Codes are all codes, in no particular order.
func Codes() []Code {
	all := make([]Code, 0, len(statuses))
	for c := range statuses {
		all = append(all, c)
	}
	return all
}

// HTTPStatus is the status that goes with a code; 500 for one this version does not have.
func (c Code) HTTPStatus() int {
	if s, ok := statuses[c]; ok {
		return s
	}
	return 500
}

// Error is the body of every answer that is not a yes.
type Error struct {
	Code Code `json:"code"`
	// Message is one sentence for a human: what is in the way.
	Message string `json:"message"`
	// Cure is one sentence: what the human can do.
	Cure string `json:"cure,omitempty"`
	// Details are facts for programs, for example the supported versions.
	Details map[string]string `json:"details,omitempty"`
	// Findings are those of the preflight.
	Findings []Finding `json:"findings,omitempty"`
}

func (e *Error) Error() string { return fmt.Sprintf("%s (%s)", Sentence(e.Message, e.Cure), e.Code) }

// Sentence joins what is in the way and what can be done about it, each a sentence or
// a part of one, without a full stop.
func Sentence(message, cure string) string {
	message, cure = strings.TrimSuffix(message, "."), strings.TrimSuffix(cure, ".")
	if cure == "" {
		return message
	}
	// A name that begins with capitals stays as it is.
	if len(cure) > 1 && cure[0] >= 'A' && cure[0] <= 'Z' && (cure[1] < 'A' || cure[1] > 'Z') {
		cure = strings.ToLower(cure[:1]) + cure[1:]
	}
	return message + "; " + cure
}

// Is makes errors.Is(err, &Error{Code: c}) compare codes.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Errorf returns an error with a code and a message.
func Errorf(c Code, format string, args ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, args...)}
}

// CodeOf is the code of the first *Error in err's chain, and "" if there is none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}
