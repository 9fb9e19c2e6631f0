package migration

import "fmt"

// Event is one thing that happened. The types below are all there are; a machine
// gets those of its own side and the common ones.
type Event interface {
	fmt.Stringer
	event()
}

// RequestID names a request of the peer that waits for an Answer. The caller
// chooses it, unique within a machine's life.
type RequestID uint64

// Verb is a request of the target to the source.
type Verb string

const (
	VerbOpen   Verb = "open"
	VerbStream Verb = "stream"
	VerbFreeze Verb = "freeze"
	VerbCommit Verb = "commit"
	VerbDone   Verb = "done"
	VerbFailed Verb = "failed"
	VerbAbort  Verb = "abort"
)

// Verdict is what became of a request, as the side that asked sees it.
type Verdict string

const (
	VerdictOK Verdict = "ok"
	// VerdictRefused: the source answered no, with a Code.
	VerdictRefused Verdict = "refused"
	// VerdictGone: the source does not know the session (any more).
	VerdictGone Verdict = "gone"
	// VerdictNoAnswer: nothing was read that tells whether the source has acted.
	VerdictNoAnswer Verdict = "no answer"
)

// Code says why a source refused. The values are the wire's.
type Code string

const (
	CodeWrongState Code = "wrong-state"
	CodeAborted    Code = "aborted"
	CodeGivenAway  Code = "given-away"
	CodeReturned   Code = "returned"
	CodeReleased   Code = "released"
	CodeNotDurable Code = "not-durable"
	// CodeIncompatible, CodeNoMemory: it is the target that lacks something.
	CodeIncompatible Code = "incompatible"
	CodeNoMemory     Code = "no-memory"
)

// Op is a call to the runtime or to the kubelet that can fail.
type Op string

const (
	OpPrepareCheckpoint Op = "prepare checkpoint"
	OpFreeze            Op = "freeze"
	OpFinishCheckpoint  Op = "finish checkpoint"
	OpMark              Op = "mark migrated"

	OpCreate         Op = "create containers"
	OpPrepareRestore Op = "prepare restore"
	OpVerify         Op = "verify"
	OpRestore        Op = "restore"
	OpInspect        Op = "inspect"
	OpStopRestored   Op = "stop restored"
	OpFinishRestore  Op = "finish restore"
	OpRecordOutcome  Op = "record outcome"
)

// Outcome is what the target's side of a migration has come to.
type Outcome string

const (
	// OutcomePending: not decided, ask again.
	OutcomePending Outcome = "pending"
	// OutcomeRestored: the clone runs and owns the pod for good.
	OutcomeRestored Outcome = "restored"
	// OutcomeFailed: no restored process exists and none will.
	OutcomeFailed Outcome = "failed"
	// OutcomeGone: the target's kubelet knows neither session nor container.
	OutcomeGone Outcome = "gone"
	// OutcomeUnknown: nobody answered.
	OutcomeUnknown Outcome = "unknown"
)

// Found is what the containers of a clone look like after a restart of its kubelet.
type Found string

const (
	// FoundNone: every container is CREATED, no restore ever ran.
	FoundNone Found = "none started"
	// FoundAll: every container is RUNNING.
	FoundAll Found = "all running"
	// FoundMixed: anything else.
	FoundMixed Found = "mixed"
)

// Events of both sides.
type (
	// Restarted is the first event of a machine that was loaded from a record.
	Restarted struct{}
	// TimerFired reports that the time of a SetTimer with this Gen has passed.
	TimerFired struct {
		Timer Timer
		Gen   uint64
	}
	// JournalWritten answers WriteJournal.
	JournalWritten struct{ Seq uint64 }
	// JournalDeleted answers DeleteJournal.
	JournalDeleted struct{ Seq uint64 }
	// JournalFailed answers WriteJournal or DeleteJournal. Unless Uncertain, the
	// journal is as it was before.
	JournalFailed struct {
		Seq       uint64
		Uncertain bool
		Message   string
	}
	// RuntimeFailed reports that an effect did not work.
	RuntimeFailed struct {
		Op      Op
		Message string
	}
	// RuntimeRestarted reports that the runtime went away or came back.
	RuntimeRestarted struct{ Message string }
	// StreamBroken reports that the checkpoint stream ended before its end.
	StreamBroken struct{ Message string }
	// Cancelled reports that the pod of this side is to end: it is deleted or
	// evicted, or, on the source, one of its containers ended.
	Cancelled struct {
		Message string
		// DryRun says that it was known from the beginning: everything was found in order,
		// and that was all that somebody wanted to know.
		DryRun bool
	}
	// PeerFenced reports that the peer's machine is off, on somebody's authority.
	PeerFenced struct{ Message string }
)

// Events of the source.
type (
	// OpenRequested: the caller has authorised and preflighted the request.
	OpenRequested   struct{ Request RequestID }
	StreamRequested struct{ Request RequestID }
	FreezeRequested struct{ Request RequestID }
	CommitRequested struct{ Request RequestID }
	DoneReported    struct{ Request RequestID }
	FailedReported  struct {
		Request RequestID
		Reason  Reason
		Message string
	}
	AbortRequested struct {
		Request RequestID
		Reason  Reason
		Message string
	}
	// CheckpointPrepared answers PrepareCheckpoint.
	CheckpointPrepared struct{ Address string }
	// CheckpointFrozen answers FreezeCheckpoint.
	CheckpointFrozen struct{ Facts FreezeFacts }
	// StreamSent: the last byte of the stream was handed to the network.
	StreamSent struct{}
	// CheckpointFinished answers FinishCheckpoint. The caller also sends it when the
	// containers do not exist any more.
	CheckpointFinished struct{}
	// SourceMarked answers MarkMigrated: the API server has the pod's final status.
	SourceMarked struct{}
	// TargetAnswered answers AskTarget.
	TargetAnswered struct {
		Outcome Outcome
		Reason  Reason
		Message string
	}
)

// FreezeFacts are the runtime's figures about a freeze.
type FreezeFacts struct {
	// FrozenAt is in nanoseconds since 1970 by the source's clock.
	FrozenAt    int64  `json:"frozenAt"`
	StreamBytes uint64 `json:"streamBytes"`
	FinalBytes  uint64 `json:"finalBytes"`
	// Durations in nanoseconds.
	FreezeDuration int64 `json:"freezeDuration"`
	DumpDuration   int64 `json:"dumpDuration"`
}

// Events of the target.
type (
	// Begun starts a new target machine.
	Begun struct{}
	// Answered reports what became of a Call.
	Answered struct {
		Verb    Verb
		Verdict Verdict
		Code    Code
		Message string
	}
	// ContainersCreated answers CreateContainers: sandbox, volumes and every
	// container exist, none was started.
	ContainersCreated struct {
		SandboxID  string
		Containers []Container
	}
	// RestorePrepared answers PrepareRestore.
	RestorePrepared struct{ Address string }
	// RoundsDone: the stream flows and what is left fits the freeze.
	RoundsDone struct{}
	// Verified answers VerifyRestore: all arrived, is whole and fits.
	Verified struct{}
	// Restored answers RestoreContainers: every container runs.
	Restored struct{}
	// Inspected answers InspectContainers.
	Inspected struct{ Found Found }
	// RestoredStopped answers StopRestored: no restored process exists.
	RestoredStopped struct{}
	// RestoreFinished answers FinishRestore.
	RestoreFinished struct{}
	// OutcomeRecorded answers RecordOutcome: the API server has it.
	OutcomeRecorded struct{}
)

func (Restarted) event()          {}
func (TimerFired) event()         {}
func (JournalWritten) event()     {}
func (JournalDeleted) event()     {}
func (JournalFailed) event()      {}
func (RuntimeFailed) event()      {}
func (RuntimeRestarted) event()   {}
func (StreamBroken) event()       {}
func (Cancelled) event()          {}
func (PeerFenced) event()         {}
func (OpenRequested) event()      {}
func (StreamRequested) event()    {}
func (FreezeRequested) event()    {}
func (CommitRequested) event()    {}
func (DoneReported) event()       {}
func (FailedReported) event()     {}
func (AbortRequested) event()     {}
func (CheckpointPrepared) event() {}
func (CheckpointFrozen) event()   {}
func (StreamSent) event()         {}
func (CheckpointFinished) event() {}
func (SourceMarked) event()       {}
func (TargetAnswered) event()     {}
func (Begun) event()              {}
func (Answered) event()           {}
func (ContainersCreated) event()  {}
func (RestorePrepared) event()    {}
func (RoundsDone) event()         {}
func (Verified) event()           {}
func (Restored) event()           {}
func (Inspected) event()          {}
func (RestoredStopped) event()    {}
func (RestoreFinished) event()    {}
func (OutcomeRecorded) event()    {}

func (Restarted) String() string      { return "kubelet restarted" }
func (e TimerFired) String() string   { return fmt.Sprintf("timer %s fired", e.Timer) }
func (JournalWritten) String() string { return "journal written" }
func (JournalDeleted) String() string { return "journal deleted" }
func (e JournalFailed) String() string {
	return "journal failed" + ifElse(e.Uncertain, " (uncertain)", "")
}
func (e RuntimeFailed) String() string    { return string(e.Op) + " failed" }
func (RuntimeRestarted) String() string   { return "runtime restarted" }
func (StreamBroken) String() string       { return "stream broken" }
func (Cancelled) String() string          { return "pod cancelled" }
func (PeerFenced) String() string         { return "peer fenced" }
func (OpenRequested) String() string      { return "open requested" }
func (StreamRequested) String() string    { return "stream requested" }
func (FreezeRequested) String() string    { return "freeze requested" }
func (CommitRequested) String() string    { return "commit requested" }
func (DoneReported) String() string       { return "done reported" }
func (FailedReported) String() string     { return "failed reported" }
func (AbortRequested) String() string     { return "abort requested" }
func (CheckpointPrepared) String() string { return "checkpoint prepared" }
func (CheckpointFrozen) String() string   { return "checkpoint frozen" }
func (StreamSent) String() string         { return "stream sent" }
func (CheckpointFinished) String() string { return "checkpoint finished" }
func (SourceMarked) String() string       { return "source marked" }
func (e TargetAnswered) String() string   { return "target answered " + string(e.Outcome) }
func (Begun) String() string              { return "begun" }
func (ContainersCreated) String() string  { return "containers created" }
func (RestorePrepared) String() string    { return "restore prepared" }
func (RoundsDone) String() string         { return "rounds done" }
func (Verified) String() string           { return "verified" }
func (Restored) String() string           { return "restored" }
func (e Inspected) String() string        { return "inspected: " + string(e.Found) }
func (RestoredStopped) String() string    { return "restored stopped" }
func (RestoreFinished) String() string    { return "restore finished" }
func (OutcomeRecorded) String() string    { return "outcome recorded" }

func (e Answered) String() string {
	s := fmt.Sprintf("%s: %s", e.Verb, e.Verdict)
	if e.Code != "" {
		s += " " + string(e.Code)
	}
	return s
}

func ifElse(cond bool, yes, no string) string {
	if cond {
		return yes
	}
	return no
}
