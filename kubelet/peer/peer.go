// Package peer speaks the contract of package wire: a handler for the kubelet that
// is asked and a client for the kubelet that asks.
//
// It is about sockets: identity of the caller, limits, deadlines, backpressure,
// cancellation, and one log line per request. It knows neither the engine nor pods:
// what a request means, and whether this caller may make it, is decided by the
// Sessions that the handler is given. The handler is registered on the kubelet's own
// port behind the kubelet's authentication and authorisation; package peer opens no
// listener.
//
// The conformance suite in wire/wiretest, which runs both sides over real TLS, shows
// that they keep the contract. It does not show that Sessions authorises correctly.
package peer

import (
	"context"
	"io"

	"podmig.dev/podmig/kubelet/wire"
)

// Caller is who asks, as the kubelet's authentication has found.
type Caller struct {
	// User is the name of the user, for example "system:node:n2".
	User string
	// Node is the name of the node when the user is one. The server refuses users
	// who are not a node, so it is never empty in a Call.
	Node string
}

// Call is what a request says about itself outside its body.
type Call struct {
	wire.Session
	Verb   wire.Verb
	Caller Caller
}

// Sessions is what the handler serves. Every method has to authorise the caller for
// the session first: the caller must be the node of a clone pod (Call.ID is its UID)
// that names the source pod, and for Outcome the node of the source pod.
//
// Methods are called concurrently. ctx ends when the caller went away or the server's
// deadline passed; a method then returns soon, but what it has begun may go on. An
// error that is not a *wire.Error is answered as internal.
type Sessions interface {
	Open(ctx context.Context, c Call, r *wire.OpenRequest) (*wire.OpenResponse, error)
	Status(ctx context.Context, c Call) (*wire.StatusResponse, error)
	// Stream returns the checkpoint. The server reads Body to its end, closes it and
	// calls Sent once.
	Stream(ctx context.Context, c Call) (*Stream, error)
	Freeze(ctx context.Context, c Call, r *wire.FreezeRequest) (*wire.FreezeResponse, error)
	Commit(ctx context.Context, c Call, r *wire.CommitRequest) (*wire.CommitResponse, error)
	Done(ctx context.Context, c Call, r *wire.DoneRequest) error
	Failed(ctx context.Context, c Call, r *wire.FailureRequest) error
	Abort(ctx context.Context, c Call, r *wire.FailureRequest) error
	// Outcome is asked by the source's node about a clone on this node.
	Outcome(ctx context.Context, c Call) (*wire.OutcomeResponse, error)
}

// Stream is a checkpoint on its way out.
type Stream struct {
	Version uint32
	Body    io.ReadCloser
	// Sent is told how many bytes were handed to the network and whether that was all.
	Sent func(bytes uint64, err error)
}

// Verdict is what an error of the Client means for the question whether the peer has
// acted. The values are the engine's.
type Verdict string

const (
	VerdictOK Verdict = "ok"
	// VerdictRefused: the peer has read the request and answered no, for good.
	VerdictRefused Verdict = "refused"
	// VerdictGone: the peer does not know the session.
	VerdictGone Verdict = "gone"
	// VerdictNoAnswer: the peer may or may not have acted; asking again is safe.
	VerdictNoAnswer Verdict = "no answer"
)

// VerdictOf classifies an error of the Client. Only codes that say what the session
// is count as an answer; overload, a failed authorisation in between or an answer of
// something that is not a migration server do not.
func VerdictOf(err error) Verdict {
	if err == nil {
		return VerdictOK
	}
	switch wire.CodeOf(err) {
	case wire.CodeUnknownSession:
		return VerdictGone
	case "", wire.CodeInternal, wire.CodeUnavailable, wire.CodeDeadline, wire.CodeTooMany:
		return VerdictNoAnswer
	}
	return VerdictRefused
}
