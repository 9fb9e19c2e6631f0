package migration

import (
	"fmt"
	"time"
)

// Effect is one thing to do. Effects are carried out in the order in which Step
// returned them; those that take long are started in that order and report with
// an event.
type Effect interface {
	fmt.Stringer
	effect()
}

// Timer names one of the two timers of a machine.
type Timer string

const (
	// TimerDeadline ends a wait.
	TimerDeadline Timer = "deadline"
	// TimerRetry repeats something.
	TimerRetry Timer = "retry"
)

// FinishOutcome is what becomes of the source's containers.
type FinishOutcome string

const (
	// FinishResume lets them run on.
	FinishResume FinishOutcome = "resume"
	// FinishStop kills them without running one more of their instructions.
	FinishStop FinishOutcome = "stop"
)

// Effects of both sides.
type (
	// WriteJournal replaces the record of this machine. Durable ones are answered
	// with JournalWritten only when they can no longer be lost; the others may be
	// written in the background, but in order.
	WriteJournal struct {
		Seq     uint64
		Durable bool
		Record  Record
	}
	// DeleteJournal removes the record of this machine, durably.
	DeleteJournal struct{ Seq uint64 }
	// SetTimer starts or restarts a timer.
	SetTimer struct {
		Timer Timer
		Gen   uint64
		After time.Duration
	}
	// StopTimer stops a timer.
	StopTimer struct{ Timer Timer }
	// Report tells the user: an event on this side's pod, and on the target the
	// condition Cloned with status Unknown. Nobody waits for it.
	Report struct {
		Warning bool
		Reason  Reason
		Message string
	}
)

// Effects of the source.
type (
	// Answer completes a request of the target.
	Answer struct {
		Request RequestID
		Verb    Verb
		// Code is empty when the answer is yes.
		Code    Code
		Message string
		// Frozen is set in the answer to a freeze.
		Frozen *FreezeFacts
	}
	// PrepareCheckpoint opens the runtime's session: CheckpointPrepared or RuntimeFailed.
	PrepareCheckpoint struct{}
	// SendStream answers a stream request by copying from the runtime's address to
	// the peer: StreamSent or StreamBroken.
	SendStream struct {
		Request RequestID
		Address string
	}
	// CutStream ends a stream that is still being sent or received.
	CutStream struct{}
	// FreezeCheckpoint freezes and sends the final part: CheckpointFrozen or RuntimeFailed.
	FreezeCheckpoint struct{}
	// FinishCheckpoint says what becomes of the containers: CheckpointFinished or RuntimeFailed.
	FinishCheckpoint struct{ Outcome FinishOutcome }
	// GuardPod keeps everything else away from the pod; SuspendProbes keeps probes from running and from
	// counting. Both stay until their counterparts and are repeated after a restart.
	GuardPod      struct{}
	UnguardPod    struct{}
	SuspendProbes struct{}
	ResumeProbes  struct{}
	// MarkMigrated gives the pod its final status: SourceMarked or RuntimeFailed.
	MarkMigrated struct{}
	// AskTarget asks the target's kubelet and the clone's status: TargetAnswered.
	AskTarget struct{}
)

// Effects of the target.
type (
	// Call sends a request to the source: Answered. Reason and Message go with failed and abort.
	Call struct {
		Verb    Verb
		Reason  Reason
		Message string
	}
	// CreateContainers lets the kubelet make sandbox, volumes, images and containers: ContainersCreated or RuntimeFailed.
	CreateContainers struct{}
	// PrepareRestore opens the runtime's session: RestorePrepared or RuntimeFailed.
	PrepareRestore struct{}
	// ReceiveStream copies the source's stream to the runtime: RoundsDone when it
	// is time to freeze, StreamBroken when it ends early.
	ReceiveStream struct{ Address string }
	// VerifyRestore waits for the end of the stream: Verified or RuntimeFailed.
	VerifyRestore struct{}
	// RestoreContainers restores all containers in parallel: Restored or RuntimeFailed.
	RestoreContainers struct{}
	// InspectContainers looks what became of them: Inspected or RuntimeFailed.
	InspectContainers struct{}
	// AdmitRestored hands the running pod to the kubelet: from here it is like any other.
	AdmitRestored struct{}
	// StopRestored ends every restored process: RestoredStopped or RuntimeFailed.
	StopRestored struct{}
	// FinishRestore releases the runtime's session: RestoreFinished or RuntimeFailed.
	FinishRestore struct{}
	// RecordOutcome writes the final condition Cloned, and for a failure the pod's
	// final phase: OutcomeRecorded or RuntimeFailed.
	RecordOutcome struct {
		Cloned  bool
		Reason  Reason
		Message string
	}
)

func (WriteJournal) effect()      {}
func (DeleteJournal) effect()     {}
func (SetTimer) effect()          {}
func (StopTimer) effect()         {}
func (Report) effect()            {}
func (Answer) effect()            {}
func (PrepareCheckpoint) effect() {}
func (SendStream) effect()        {}
func (CutStream) effect()         {}
func (FreezeCheckpoint) effect()  {}
func (FinishCheckpoint) effect()  {}
func (GuardPod) effect()          {}
func (UnguardPod) effect()        {}
func (SuspendProbes) effect()     {}
func (ResumeProbes) effect()      {}
func (MarkMigrated) effect()      {}
func (AskTarget) effect()         {}
func (Call) effect()              {}
func (CreateContainers) effect()  {}
func (PrepareRestore) effect()    {}
func (ReceiveStream) effect()     {}
func (VerifyRestore) effect()     {}
func (RestoreContainers) effect() {}
func (InspectContainers) effect() {}
func (AdmitRestored) effect()     {}
func (StopRestored) effect()      {}
func (FinishRestore) effect()     {}
func (RecordOutcome) effect()     {}

func (e WriteJournal) String() string {
	return fmt.Sprintf("journal %s%s", e.Record.State, ifElse(e.Durable, " (durable)", ""))
}
func (DeleteJournal) String() string      { return "delete journal" }
func (e SetTimer) String() string         { return fmt.Sprintf("set %s %s", e.Timer, e.After) }
func (e StopTimer) String() string        { return fmt.Sprintf("stop %s", e.Timer) }
func (PrepareCheckpoint) String() string  { return "prepare checkpoint" }
func (SendStream) String() string         { return "send stream" }
func (CutStream) String() string          { return "cut stream" }
func (FreezeCheckpoint) String() string   { return "freeze" }
func (e FinishCheckpoint) String() string { return "finish checkpoint: " + string(e.Outcome) }
func (GuardPod) String() string           { return "guard pod" }
func (UnguardPod) String() string         { return "unguard pod" }
func (SuspendProbes) String() string      { return "suspend probes" }
func (ResumeProbes) String() string       { return "resume probes" }
func (MarkMigrated) String() string       { return "mark migrated" }
func (AskTarget) String() string          { return "ask target" }
func (CreateContainers) String() string   { return "create containers" }
func (PrepareRestore) String() string     { return "prepare restore" }
func (ReceiveStream) String() string      { return "receive stream" }
func (VerifyRestore) String() string      { return "verify" }
func (RestoreContainers) String() string  { return "restore" }
func (InspectContainers) String() string  { return "inspect" }
func (AdmitRestored) String() string      { return "admit restored" }
func (StopRestored) String() string       { return "stop restored" }
func (FinishRestore) String() string      { return "finish restore" }
func (e Report) String() string {
	return fmt.Sprintf("report %s%s", e.Reason, ifElse(e.Warning, " (warning)", ""))
}
func (e Answer) String() string {
	if e.Code == "" {
		return fmt.Sprintf("answer %s: ok", e.Verb)
	}
	return fmt.Sprintf("answer %s: refused %s", e.Verb, e.Code)
}
func (e Call) String() string {
	return fmt.Sprintf("call %s%s", e.Verb, ifElse(e.Reason != "", fmt.Sprintf(" (%s)", e.Reason), ""))
}
func (e RecordOutcome) String() string {
	return fmt.Sprintf("record Cloned=%t %s", e.Cloned, e.Reason)
}
