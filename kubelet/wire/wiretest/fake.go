// Package wiretest is the conformance suite of the contract in package wire: what
// every server and every client of it have to do, as HTTP over real TLS, attacks
// included.
//
// A server under test is put in front of a Fake, a client under test in front of a
// server that misbehaves. The suite shows that both keep the contract; that the real
// sessions behind the server authorise and order requests correctly is not its
// matter.
package wiretest

import (
	"bytes"
	"io"
	"sync"

	"podmig.dev/podmig/kubelet/wire"
)

// Request is what reached the sessions behind a server.
type Request struct {
	Verb    wire.Verb
	Session wire.Session
	// User and Node are the caller's.
	User, Node string
	Body       any
}

// Fake stands for the sessions behind a server. It has one session, Session, which
// belongs to the node n2.
type Fake struct {
	mu       sync.Mutex
	requests []Request
	// Fail makes every request of a verb fail with an error.
	Fail map[wire.Verb]error
	// Hold makes every request of a verb wait for the channel to be closed or for the
	// caller to go away.
	Hold map[wire.Verb]chan struct{}
	// Checkpoint is the content of the stream.
	Checkpoint io.Reader
	// Sent is told what the server says about the end of the stream.
	Sent chan SentStream
}

// SentStream is the end of a stream as the server sees it.
type SentStream struct {
	Bytes uint64
	Err   error
}

// Session is the one that exists.
var Session = wire.Session{Namespace: "default", Pod: "redis", ID: "c10e0000-0000-4000-8000-000000000001"}

// StreamVersion is that of the fake's stream.
const StreamVersion = 3

// NewFake returns sessions that say yes to everything that n2 asks about Session.
func NewFake() *Fake {
	return &Fake{
		Fail: map[wire.Verb]error{}, Hold: map[wire.Verb]chan struct{}{},
		Checkpoint: bytes.NewReader([]byte("checkpoint")), Sent: make(chan SentStream, 16),
	}
}

// Requests are those that the fake has accepted.
func (f *Fake) Requests() []Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Request(nil), f.requests...)
}

// Serve is the fake's answer. done is closed when the caller goes away.
func (f *Fake) Serve(done <-chan struct{}, r Request) (any, error) {
	if r.Node != "n2" {
		return nil, wire.Errorf(wire.CodeForbidden, "node %s is not the node of the clone", r.Node)
	}
	if r.Session != Session {
		return nil, wire.Errorf(wire.CodeUnknownSession, "there is no migration %s here", r.Session.ID)
	}
	f.mu.Lock()
	f.requests = append(f.requests, r)
	err, hold := f.Fail[r.Verb], f.Hold[r.Verb]
	f.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-done:
			return nil, io.ErrClosedPipe
		}
	}
	if err != nil {
		return nil, err
	}
	return Answers[r.Verb], nil
}

// features are enough to be valid.
var features = wire.Features{StreamVersions: []uint32{StreamVersion}, RuntimeName: "containerd", RuntimeVersion: "v2.4.2",
	CRIUVersion: "4.2.1", KernelRelease: "6.18", Architecture: "amd64"}

// Bodies are the bodies of requests that have one.
var Bodies = map[wire.Verb]any{
	wire.VerbOpen: &wire.OpenRequest{Clone: "redis-2", SourceUID: "50c00000-0000-4000-8000-000000000002", TargetNode: "n2",
		Features: features, Containers: []wire.TargetContainer{{Name: "redis", Image: "redis:1"}}},
	wire.VerbFreeze: &wire.FreezeRequest{},
	wire.VerbCommit: &wire.CommitRequest{},
	wire.VerbDone:   &wire.DoneRequest{ResumedAt: 5},
	wire.VerbFailed: &wire.FailureRequest{Reason: "RestoreFailed", Message: "no"},
	wire.VerbAbort:  &wire.FailureRequest{Reason: "Cancelled", Message: "deleted"},
}

// Answers are the fake's answers, but for the stream.
var Answers = map[wire.Verb]any{
	wire.VerbOpen: &wire.OpenResponse{StreamVersion: StreamVersion, SourceNode: "n1", Features: features,
		Containers: []wire.SourceContainer{{Name: "redis", Image: "redis:1", ImageDigest: "sha256:aa", RestartCount: 1}}},
	wire.VerbStatus:  &wire.StatusResponse{State: "Frozen"},
	wire.VerbFreeze:  &wire.FreezeResponse{FrozenAt: 1, StreamBytes: 10, FinalBytes: 2},
	wire.VerbCommit:  &wire.CommitResponse{},
	wire.VerbDone:    &wire.Empty{},
	wire.VerbFailed:  &wire.Empty{},
	wire.VerbAbort:   &wire.Empty{},
	wire.VerbOutcome: &wire.OutcomeResponse{Outcome: wire.OutcomePending},
}
