package migration

import (
	"fmt"
	"slices"
)

// SourceState is where a source stands. Each state says what the target should do
// while the source is in it.
//
//	Fresh ──open──▶ Open ──stream──▶ Preparing ──prepared──▶ Streaming
//	                                                            │ freeze
//	                 commit            frozen                   ▼
//	     Giving ◀────────────── Frozen ◀──────────────────── Freezing
//	       │ journal durable
//	       ▼            done
//	   GivenAway ──────────────────▶ Releasing ──stopped, marked──▶ Released
//	       │ failed, fenced
//	       └───────────────────────▶ Returning ──thawed───────────▶ Returned
//
//	   Open … Frozen ──abort, failed, deadline, error, pod ends───▶ Aborting ──thawed──▶ Aborted
//	   Giving ──journal failed──▶ Aborting
//
// Ownership leaves the source on the edge Giving → GivenAway and comes back on the
// edge GivenAway → Returning. There is no edge from GivenAway or behind it to
// Aborting: no deadline, error or lost connection takes the pod back.
type SourceState string

const (
	// SourceFresh: the target has not asked for anything.
	SourceFresh SourceState = "Fresh"
	// SourceOpen: the target makes its containers, then asks for the stream. It may
	// open again to say that it is still there.
	SourceOpen SourceState = "Open"
	// SourcePreparing: the target waits for the first byte of the stream.
	SourcePreparing SourceState = "Preparing"
	// SourceStreaming: the target reads, and asks for the freeze when it is time.
	SourceStreaming SourceState = "Streaming"
	// SourceFreezing: the target goes on reading; the final part comes.
	SourceFreezing SourceState = "Freezing"
	// SourceFrozen: the target verifies and asks to commit, or aborts.
	SourceFrozen SourceState = "Frozen"
	// SourceGiving: the target waits for the answer to its commit.
	SourceGiving SourceState = "Giving"
	// SourceGivenAway: the target owns the pod. It restores and says done or failed;
	// if it has not read the answer it asks to commit again.
	SourceGivenAway SourceState = "GivenAway"
	// SourceReleasing: the target has nothing left to do once its done is answered.
	SourceReleasing SourceState = "Releasing"
	// SourceReturning: the target has nothing left to do once its failed is answered.
	SourceReturning SourceState = "Returning"
	// SourceAborting: the target gives up.
	SourceAborting SourceState = "Aborting"

	// SourceReleased: the clone is the pod. The session is forgotten.
	SourceReleased SourceState = "Released"
	// SourceReturned: the source runs on after a failed restore. The session is forgotten.
	SourceReturned SourceState = "Returned"
	// SourceAborted: the source runs on as if nothing had happened. The session is forgotten.
	SourceAborted SourceState = "Aborted"
)

// SourceStates are all states of a source.
var SourceStates = []SourceState{
	SourceFresh, SourceOpen, SourcePreparing, SourceStreaming, SourceFreezing, SourceFrozen, SourceGiving,
	SourceGivenAway, SourceReleasing, SourceReturning, SourceAborting,
	SourceReleased, SourceReturned, SourceAborted,
}

// recordedSource are the states that a source writes to its journal. Preparing
// stands for everything up to the commit: what it asks for after a restart is a thaw.
var recordedSource = map[SourceState]bool{
	SourcePreparing: true, SourceGivenAway: true, SourceReleasing: true,
	SourceReturning: true, SourceAborting: true,
}

// Source is the machine of the node that gives a pod away.
type Source struct {
	machine
	state SourceState

	// pending are requests that wait for an answer.
	pending []pendingRequest
	// stream is the request that the stream will answer.
	stream  RequestID
	cut     bool // a stream may be running
	guarded bool // GuardPod and SuspendProbes are in force
	facts   *FreezeFacts
	// durable: the record of the state was written (Releasing, Returning, Aborting).
	durable bool
	// silent: the user has heard that the target does not answer.
	silent bool
	// takeBack: the target gave up while the pod was being given away.
	takeBack bool
	reason   Reason
	message  string
}

type pendingRequest struct {
	id   RequestID
	verb Verb
}

// NewSource returns a machine that waits for its OpenRequested.
func NewSource(id Identity, dl Deadlines) *Source {
	return &Source{machine: newMachine(SideSource, id, dl), state: SourceFresh}
}

// LoadSource returns the machine of a record; its first event is Restarted.
func LoadSource(r Record, dl Deadlines) (*Source, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	if r.Side != SideSource {
		return nil, fmt.Errorf("%w: side %q, want %q", ErrRecord, r.Side, SideSource)
	}
	s := NewSource(r.Identity, dl)
	s.state, s.reason, s.message = SourceState(r.State), r.Reason, r.Message
	s.fresh, s.recorded, s.durable = true, true, true
	return s, nil
}

// State is where the machine stands.
func (s *Source) State() SourceState { return s.state }

// Reason tells why the migration ends or ended without a clone; empty otherwise.
func (s *Source) Reason() (Reason, string) { return s.reason, s.message }

// Owns reports whether the source has the right to run the pod's processes.
func (s *Source) Owns() bool {
	switch s.state {
	case SourceGivenAway, SourceReleasing, SourceReleased:
		return false
	case SourceGiving:
		// The record may already be on disk, but nobody has been told.
		return true
	case SourceReturning:
		return s.durable
	}
	return true
}

// Terminal reports whether the machine has nothing left to do.
func (s *Source) Terminal() bool {
	return s.state == SourceReleased || s.state == SourceReturned || s.state == SourceAborted
}

// Step takes one event and returns what to do. The error is ErrUnlisted.
func (s *Source) Step(e Event) ([]Effect, error) {
	s.out = nil
	if _, ok := e.(Restarted); ok != s.fresh {
		return nil, fmt.Errorf("source in %s, %s: %w", s.state, e, ErrUnlisted)
	}
	if t, ok := e.(TimerFired); ok && !s.fired(t) {
		return nil, nil
	}
	rules := map[SourceState]func(Event) bool{
		SourceFresh: s.inFresh, SourceOpen: s.inOpen, SourcePreparing: s.inPreparing,
		SourceStreaming: s.inStreaming, SourceFreezing: s.inFreezing, SourceFrozen: s.inFrozen,
		SourceGiving: s.inGiving, SourceGivenAway: s.inGivenAway, SourceReleasing: s.inReleasing,
		SourceReturning: s.inReturning, SourceAborting: s.inAborting,
		SourceReleased: s.inTerminal, SourceReturned: s.inTerminal, SourceAborted: s.inTerminal,
	}
	if s.fresh {
		s.fresh = false
		s.restart()
	} else if !rules[s.state](e) {
		return nil, fmt.Errorf("source in %s, %s: %w", s.state, e, ErrUnlisted)
	}
	return s.out, nil
}

// restart takes up what the record says.
func (s *Source) restart() {
	s.guard()
	switch s.state {
	case SourceGivenAway:
		// Not a word about who is right: the journal says that it was given away, so it
		// stays frozen until the target says what became of it.
		s.ask()
	case SourceReleasing:
		s.release()
	case SourceReturning:
		s.thaw()
	default:
		// The pod was never given away, or the attempt to do so was taken back.
		s.abort(ReasonKubeletRestarted, "the kubelet of the source restarted before the commit")
	}
}

func (s *Source) inFresh(e Event) bool {
	switch e := e.(type) {
	case OpenRequested:
		s.state = SourceOpen
		s.emit(Answer{Request: e.Request, Verb: VerbOpen})
		s.setTimer(TimerDeadline, s.dl.Idle)
		return true
	}
	return s.idle(e, "the session was not opened")
}

// idle has the rules of Fresh and Open, where nothing was asked of the runtime.
func (s *Source) idle(e Event, msg string) bool {
	switch e.(type) {
	case RuntimeFailed, RuntimeRestarted, StreamBroken:
		return true
	}
	return s.common(e, CodeWrongState, msg)
}

func (s *Source) inOpen(e Event) bool {
	switch e := e.(type) {
	case OpenRequested:
		s.emit(Answer{Request: e.Request, Verb: VerbOpen})
		s.setTimer(TimerDeadline, s.dl.Idle)
		return true
	case StreamRequested:
		s.state = SourcePreparing
		s.stream = e.Request
		s.pend(e.Request, VerbStream)
		s.setTimer(TimerDeadline, s.dl.Stream)
		// From here the runtime keeps a session, which a crash must not leave behind.
		s.write(string(SourcePreparing), true, "", "", false)
		return true
	case TimerFired:
		if e.Timer == TimerDeadline {
			s.abort(ReasonDeadlineExceeded, "the target opened a session and did not use it")
		}
		return true
	}
	return s.idle(e, "the stream was not asked for")
}

func (s *Source) inPreparing(e Event) bool {
	switch e := e.(type) {
	case JournalWritten:
		if e.Seq == s.seq {
			s.emit(PrepareCheckpoint{})
		}
		return true
	case JournalFailed:
		if e.Seq == s.seq {
			s.abort(ReasonJournalFailed, "the source's journal cannot be written: "+e.Message)
		}
		return true
	case CheckpointPrepared:
		s.state = SourceStreaming
		s.unpend(VerbStream)
		s.cut = true
		s.emit(SendStream{Request: s.stream, Address: e.Address}, Report{Reason: ReasonStreaming,
			Message: "The pod's state is being copied to its clone; it keeps running."})
		return true
	}
	return s.common(e, CodeWrongState, "the stream is being prepared")
}

func (s *Source) inStreaming(e Event) bool {
	switch e := e.(type) {
	case FreezeRequested:
		s.state = SourceFreezing
		s.pend(e.Request, VerbFreeze)
		s.guard()
		s.emit(FreezeCheckpoint{})
		s.setTimer(TimerDeadline, s.dl.Freeze)
		return true
	case StreamSent:
		s.abort(ReasonStreamFailed, "the stream ended before the freeze")
		return true
	}
	return s.common(e, CodeWrongState, "the pod is not frozen")
}

func (s *Source) inFreezing(e Event) bool {
	switch e := e.(type) {
	case FreezeRequested:
		s.pend(e.Request, VerbFreeze)
		return true
	case CommitRequested:
		// The target can have verified everything before this side has heard from its
		// own runtime.
		s.pend(e.Request, VerbCommit)
		return true
	case CheckpointFrozen:
		s.state = SourceFrozen
		s.facts = &e.Facts
		for _, id := range s.unpend(VerbFreeze) {
			s.emit(Answer{Request: id, Verb: VerbFreeze, Frozen: s.facts})
		}
		if s.waiting(VerbCommit) {
			s.give()
		}
		s.emit(Report{Reason: ReasonFrozen, Message: "The pod is frozen for the last part of its move."})
		return true
	case StreamSent:
		s.cut = false
		return true
	}
	return s.common(e, CodeWrongState, "the pod is being frozen")
}

func (s *Source) inFrozen(e Event) bool {
	switch e := e.(type) {
	case FreezeRequested:
		s.emit(Answer{Request: e.Request, Verb: VerbFreeze, Frozen: s.facts})
		return true
	case CommitRequested:
		s.pend(e.Request, VerbCommit)
		s.give()
		return true
	case StreamSent:
		s.cut = false
		return true
	}
	return s.common(e, CodeWrongState, "the pod is frozen and was not committed")
}

// give writes the record that gives the pod away. Nothing is answered before it is durable.
func (s *Source) give() {
	s.state = SourceGiving
	s.write(string(SourceGivenAway), true, "", "", false)
	s.setTimer(TimerDeadline, s.dl.Freeze)
}

func (s *Source) inGiving(e Event) bool {
	switch e := e.(type) {
	case CommitRequested:
		s.pend(e.Request, VerbCommit)
	case FailedReported:
		// The target has decided never to restore. The record is on its way to the disk,
		// so the pod is taken back the long way.
		s.pend(e.Request, VerbFailed)
		s.takeBack, s.reason, s.message = true, e.Reason, e.Message
	case PeerFenced:
		// The same, on somebody else's word.
		s.takeBack, s.reason, s.message = true, ReasonReturned, e.Message
	case JournalWritten:
		if e.Seq != s.seq {
			break
		}
		s.state = SourceGivenAway
		s.cut = false
		if s.takeBack {
			s.takePodBack(s.reason, s.message)
			break
		}
		for _, id := range s.unpend(VerbCommit) {
			s.emit(Answer{Request: id, Verb: VerbCommit, Frozen: s.facts})
		}
		s.setTimer(TimerDeadline, s.dl.Outcome)
		s.emit(Report{Reason: ReasonGivenAway,
			Message: "The pod was given to its clone and stays frozen until the clone runs."})
	case JournalFailed:
		if e.Seq != s.seq {
			break
		}
		for _, id := range s.unpend(VerbCommit) {
			s.emit(Answer{Request: id, Verb: VerbCommit, Code: CodeNotDurable, Message: e.Message})
		}
		// Nobody was told, so the pod is still this side's. But if the record may be on
		// disk, it has to go before the processes run: a restart would believe it.
		s.durable = !e.Uncertain
		s.abort(ReasonJournalFailed, "the source's journal cannot be written: "+e.Message)
	case TimerFired:
		if e.Timer == TimerDeadline {
			s.setTimer(TimerDeadline, s.dl.Freeze)
			s.emit(Report{Warning: true, Reason: ReasonRetrying,
				Message: "The pod stays frozen: the journal on this node's disk does not answer."})
		}
	case AbortRequested:
		s.refuse(e.Request, VerbAbort, CodeGivenAway, "the pod is being given away")
	case Cancelled, RuntimeRestarted, RuntimeFailed, StreamBroken, StreamSent:
		// The target has everything; the record decides.
	default:
		return s.refuseAny(e, CodeWrongState, "the pod is being given away") || sourceEvent(e)
	}
	return true
}

// common has the rules of all states before the commit.
func (s *Source) common(e Event, code Code, msg string) bool {
	switch e := e.(type) {
	case FailedReported:
		s.abort(e.Reason, e.Message)
		s.emit(Answer{Request: e.Request, Verb: VerbFailed})
	case AbortRequested:
		s.abort(e.Reason, e.Message)
		s.emit(Answer{Request: e.Request, Verb: VerbAbort})
	case Cancelled:
		s.abort(ReasonCancelled, e.Message)
	case PeerFenced:
		s.abort(ReasonCancelled, e.Message)
	case RuntimeFailed:
		reason, ours := map[Op]Reason{OpPrepareCheckpoint: ReasonPrepareFailed, OpFreeze: ReasonFreezeFailed}[e.Op]
		if ours {
			s.abort(reason, "the source's runtime failed to "+string(e.Op)+": "+e.Message)
		}
	case RuntimeRestarted:
		// It may have thawed what it froze.
		s.abort(ReasonRuntimeRestarted, "the source's runtime went away before the commit")
	case StreamBroken:
		s.abort(ReasonStreamFailed, "the stream broke: "+e.Message)
	case TimerFired:
		if e.Timer == TimerDeadline {
			s.abort(ReasonDeadlineExceeded, "the migration stood still in state "+string(s.state))
		}
	default:
		return s.refuseAny(e, code, msg) || sourceEvent(e)
	}
	return true
}

// refuseAny answers any request with a code.
func (s *Source) refuseAny(e Event, code Code, msg string) bool {
	id, verb, ok := request(e)
	if ok {
		s.refuse(id, verb, code, msg)
	}
	return ok
}

func (s *Source) refuse(id RequestID, verb Verb, code Code, msg string) {
	s.emit(Answer{Request: id, Verb: verb, Code: code, Message: msg})
}

func (s *Source) pend(id RequestID, verb Verb) {
	s.pending = append(s.pending, pendingRequest{id, verb})
}

func (s *Source) waiting(verb Verb) bool {
	return slices.ContainsFunc(s.pending, func(p pendingRequest) bool { return p.verb == verb })
}

// unpend takes the requests of a verb off the list.
func (s *Source) unpend(verb Verb) []RequestID {
	var ids []RequestID
	s.pending = slices.DeleteFunc(s.pending, func(p pendingRequest) bool {
		if p.verb == verb {
			ids = append(ids, p.id)
		}
		return p.verb == verb
	})
	return ids
}

func request(e Event) (RequestID, Verb, bool) {
	switch e := e.(type) {
	case OpenRequested:
		return e.Request, VerbOpen, true
	case StreamRequested:
		return e.Request, VerbStream, true
	case FreezeRequested:
		return e.Request, VerbFreeze, true
	case CommitRequested:
		return e.Request, VerbCommit, true
	case DoneReported:
		return e.Request, VerbDone, true
	case FailedReported:
		return e.Request, VerbFailed, true
	case AbortRequested:
		return e.Request, VerbAbort, true
	}
	return 0, "", false
}

// sourceEvent reports whether an event is one that a source may get at any time,
// because it is the late result of something that no longer matters.
func sourceEvent(e Event) bool {
	switch e.(type) {
	case TimerFired, JournalWritten, JournalDeleted, JournalFailed, RuntimeFailed, RuntimeRestarted,
		StreamBroken, Cancelled, PeerFenced, CheckpointPrepared, CheckpointFrozen, StreamSent,
		CheckpointFinished, SourceMarked, TargetAnswered:
		return true
	}
	return false
}
