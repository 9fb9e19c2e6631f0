package migration

import (
	"fmt"
	"slices"
)

// TargetState is where a target stands. Each state says what the source should do
// while the target is in it.
//
//	Fresh ──▶ Opening ──opened──▶ Preparing ──containers created──▶ Arming
//	                                                                  │ stream
//	             verified, journal              rounds done           ▼
//	  Committing ◀─────────────── FreezeAsked ◀─────────────────── Receiving
//	      │ commit answered yes
//	      ▼            restored             told, recorded, released
//	  Restoring ──────────────────▶ Running ────────────────────────▶ Done
//	      │ error, deadline
//	      └───────────────────────▶ Failing ──cleared, told, recorded──▶ Failed
//
//	  Opening … FreezeAsked ──error, deadline, cancel──▶ Aborting ──▶ Failed
//	  Committing ──refused, cancel, source fenced──▶ Failing
//	  restart: Arming ──▶ Aborting;  Committing, Restoring ──▶ Inspecting ──none started──▶ Committing
//	                                                               ├──────all running───▶ Running
//	                                                               └──────mixed─────────▶ Failing
//
// The only edge into Restoring is an answer to the commit that this very process has
// read. Failed and the outcome "failed" lie behind Aborting, where no restore was
// ever begun, or behind the moment in Failing when the runtime has confirmed that no
// restored process exists.
type TargetState string

const (
	// TargetFresh: the source knows nothing yet.
	TargetFresh TargetState = "Fresh"
	// TargetOpening: the source authorises, compares and looks for what is in the way.
	TargetOpening TargetState = "Opening"
	// TargetPreparing: the source keeps the session open.
	TargetPreparing TargetState = "Preparing"
	// TargetArming: as Preparing; the target's runtime gets ready to take the stream.
	TargetArming TargetState = "Arming"
	// TargetReceiving: the source sends, its pod runs.
	TargetReceiving TargetState = "Receiving"
	// TargetFreezeAsked: the source freezes the pod and sends the final part.
	TargetFreezeAsked TargetState = "FreezeAsked"
	// TargetCommitting: the source gives the pod away, or has thawed it and says so.
	TargetCommitting TargetState = "Committing"
	// TargetRestoring: the source stays frozen.
	TargetRestoring TargetState = "Restoring"
	// TargetRunning: the source stops its frozen processes once it is told.
	TargetRunning TargetState = "Running"
	// TargetInspecting: the source stays as it is; the target finds out where it was.
	TargetInspecting TargetState = "Inspecting"
	// TargetAborting: the source thaws.
	TargetAborting TargetState = "Aborting"
	// TargetFailing: the source stays frozen until it hears that no process was restored.
	TargetFailing TargetState = "Failing"

	// TargetDone: the clone is the pod. The session is forgotten.
	TargetDone TargetState = "Done"
	// TargetFailed: the clone never ran and never will. The session is forgotten.
	TargetFailed TargetState = "Failed"
)

// TargetStates are all states of a target.
var TargetStates = []TargetState{
	TargetFresh, TargetOpening, TargetPreparing, TargetArming, TargetReceiving, TargetFreezeAsked,
	TargetCommitting, TargetRestoring, TargetRunning, TargetInspecting, TargetAborting, TargetFailing,
	TargetDone, TargetFailed,
}

// recordedTarget are the states that a target writes to its journal. Before Arming
// there is nothing to clean up: a restarted kubelet begins the migration anew.
var recordedTarget = map[TargetState]bool{
	TargetArming: true, TargetCommitting: true, TargetRestoring: true,
	TargetRunning: true, TargetFailing: true,
}

// Target is the machine of the node that takes a pod over.
type Target struct {
	machine
	state TargetState

	receiving bool // the stream may be running
	armed     bool // the runtime may have a session
	asked     bool // the source may have been asked to commit
	cleared   bool // no restored process exists (Failing)
	durable   bool // the record of Running is on disk
	tell      bool // the source has to hear of the failure
	fenced    bool // the source's node is off
	cancelled bool // the clone is to end
	reason    Reason
	message   string
}

// NewTarget returns a machine that waits for its Begun.
func NewTarget(id Identity, dl Deadlines) *Target {
	return &Target{machine: newMachine(SideTarget, id, dl), state: TargetFresh}
}

// LoadTarget returns the machine of a record; its first event is Restarted.
func LoadTarget(r Record, dl Deadlines) (*Target, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	if r.Side != SideTarget {
		return nil, fmt.Errorf("%w: side %q, want %q", ErrRecord, r.Side, SideTarget)
	}
	t := NewTarget(r.Identity, dl)
	t.state, t.reason, t.message, t.tell = TargetState(r.State), r.Reason, r.Message, r.Tell
	t.fresh, t.recorded, t.armed = true, true, true
	if t.reason == "" && t.state == TargetFailing {
		t.reason = ReasonRestoreFailed
	}
	return t, nil
}

// State is where the machine stands.
func (t *Target) State() TargetState { return t.state }

// Reason tells why the migration fails or failed; empty otherwise.
func (t *Target) Reason() (Reason, string) { return t.reason, t.message }

// Owns reports whether the target has the right to run the pod's processes.
func (t *Target) Owns() bool {
	return t.state == TargetRestoring || t.state == TargetRunning || t.state == TargetDone
}

// Outcome is what the source's kubelet is told when it asks.
func (t *Target) Outcome() (Outcome, Reason, string) {
	switch {
	case t.fresh:
	case t.state == TargetDone, t.state == TargetRunning && t.durable:
		return OutcomeRestored, ReasonCloned, ""
	case t.state == TargetFailed, t.state == TargetAborting, t.state == TargetFailing && t.cleared:
		return OutcomeFailed, t.reason, t.message
	}
	return OutcomePending, "", ""
}

// Terminal reports whether the machine has nothing left to do.
func (t *Target) Terminal() bool { return t.state == TargetDone || t.state == TargetFailed }

// Step takes one event and returns what to do. The error is ErrUnlisted.
func (t *Target) Step(e Event) ([]Effect, error) {
	t.out = nil
	if _, ok := e.(Restarted); ok != t.fresh {
		return nil, fmt.Errorf("target in %s, %s: %w", t.state, e, ErrUnlisted)
	}
	if f, ok := e.(TimerFired); ok && !t.fired(f) {
		return nil, nil
	}
	rules := map[TargetState]func(Event) bool{
		TargetFresh: t.inFresh, TargetOpening: t.inOpening, TargetPreparing: t.inPreparing,
		TargetArming: t.inArming, TargetReceiving: t.inReceiving, TargetFreezeAsked: t.inFreezeAsked,
		TargetCommitting: t.inCommitting, TargetRestoring: t.inRestoring, TargetRunning: t.inRunning,
		TargetInspecting: t.inInspecting, TargetAborting: t.inAborting, TargetFailing: t.inFailing,
		TargetDone: t.inTerminal, TargetFailed: t.inTerminal,
	}
	if t.fresh {
		t.fresh = false
		t.restart()
	} else if !rules[t.state](e) {
		return nil, fmt.Errorf("target in %s, %s: %w", t.state, e, ErrUnlisted)
	}
	return t.out, nil
}

// restart takes up what the record says.
func (t *Target) restart() {
	switch t.state {
	case TargetCommitting, TargetRestoring:
		t.state = TargetInspecting
		t.emit(Report{Reason: ReasonResuming, Message: "The kubelet restarted and finds out how far the restore got."})
		t.start(choreInspect, t.perform)
	case TargetRunning:
		t.running()
	case TargetFailing:
		t.start(choreClear, t.perform)
	default:
		t.abort(ReasonKubeletRestarted, "the target's kubelet restarted before the commit", true)
	}
}

func (t *Target) inFresh(e Event) bool {
	switch e.(type) {
	case Begun:
		t.state = TargetOpening
		t.emit(Report{Reason: ReasonOpening, Message: "Asking node " + t.id.PeerNode + " for pod " + t.id.SourcePod + "."},
			Call{Verb: VerbOpen})
		t.setTimer(TimerDeadline, t.dl.Open)
		return true
	}
	return t.before(e)
}

func (t *Target) inOpening(e Event) bool {
	switch e := e.(type) {
	case Answered:
		if e.Verb != VerbOpen {
			break
		}
		switch e.Verdict {
		case VerdictOK:
			t.state, t.tries = TargetPreparing, 0
			t.emit(Report{Reason: ReasonPreparing, Message: "Creating sandbox, volumes and containers."}, CreateContainers{})
			t.setTimer(TimerDeadline, t.dl.Prepare)
			t.setTimer(TimerRetry, t.dl.Idle/3)
		case VerdictNoAnswer:
			t.message = e.Message
			t.later()
		default:
			t.abort(openRefused(e.Code), e.Message, false)
		}
		return true
	case TimerFired:
		if e.Timer == TimerRetry {
			t.emit(Call{Verb: VerbOpen})
		} else {
			t.abort(ReasonSourceUnreachable, "the source's kubelet does not answer: "+t.message, true)
		}
		return true
	}
	return t.before(e)
}

// openRefused tells whose fault it is that a session was not opened.
func openRefused(c Code) Reason {
	if c == CodeIncompatible || c == CodeNoMemory {
		return ReasonTargetUnfit
	}
	return ReasonSourceRefused
}

func (t *Target) inPreparing(e Event) bool {
	switch e := e.(type) {
	case ContainersCreated:
		t.state = TargetArming
		t.id.SandboxID, t.id.Containers = e.SandboxID, slices.Clone(e.Containers)
		t.stopTimer(TimerRetry)
		t.setTimer(TimerDeadline, t.dl.Stream)
		// From here the runtime keeps a session, which a crash must not leave behind.
		t.write(string(TargetArming), true, "", "", false)
		return true
	case Answered:
		if e.Verb == VerbOpen && (e.Verdict == VerdictRefused || e.Verdict == VerdictGone) {
			t.abort(openRefused(e.Code), e.Message, true)
		}
		return true
	case TimerFired:
		if e.Timer == TimerRetry {
			// The source closes a session that nobody uses.
			t.emit(Call{Verb: VerbOpen})
			t.setTimer(TimerRetry, t.dl.Idle/3)
			return true
		}
	}
	return t.before(e)
}

func (t *Target) inArming(e Event) bool {
	switch e := e.(type) {
	case JournalWritten:
		if e.Seq == t.seq {
			t.armed = true
			t.emit(PrepareRestore{})
		}
		return true
	case JournalFailed:
		if e.Seq == t.seq {
			t.abort(ReasonJournalFailed, "the target's journal cannot be written: "+e.Message, true)
		}
		return true
	case RestorePrepared:
		t.state, t.receiving = TargetReceiving, true
		t.emit(ReceiveStream{Address: e.Address}, VerifyRestore{},
			Report{Reason: ReasonReceiving, Message: "The pod's state is being received."})
		return true
	}
	return t.before(e)
}

func (t *Target) inReceiving(e Event) bool {
	switch e.(type) {
	case RoundsDone:
		t.state = TargetFreezeAsked
		t.emit(Call{Verb: VerbFreeze}, Report{Reason: ReasonFreezing, Message: "The source is being frozen for the last part of its state."})
		t.setTimer(TimerDeadline, t.dl.Freeze)
		return true
	case Verified:
		t.abort(ReasonVerifyFailed, "the stream was complete before the source was frozen", true)
		return true
	}
	return t.before(e)
}

func (t *Target) inFreezeAsked(e Event) bool {
	switch e := e.(type) {
	case Answered:
		if e.Verb == VerbFreeze && e.Verdict != VerdictOK {
			t.abort(ReasonFreezeFailed, "the source did not freeze: "+e.Message, true)
		}
		return true
	case Verified:
		t.state, t.receiving = TargetCommitting, false
		t.write(string(TargetCommitting), true, "", "", false)
		t.setTimer(TimerDeadline, t.dl.Commit)
		return true
	}
	return t.before(e)
}

func (t *Target) inCommitting(e Event) bool {
	switch e := e.(type) {
	case JournalWritten:
		if e.Seq == t.seq && !t.asked {
			t.askCommit()
			t.emit(Report{Reason: ReasonCommitting, Message: "Taking over from the source."})
		}
	case JournalFailed:
		if e.Seq == t.seq && !t.asked {
			t.abort(ReasonJournalFailed, "the target's journal cannot be written: "+e.Message, true)
		}
	case Answered:
		if e.Verb == VerbCommit && t.asked {
			t.commitAnswered(e)
		}
	case TimerFired:
		if e.Timer == TimerRetry {
			t.askCommit()
			break
		}
		t.setTimer(TimerDeadline, t.dl.Commit)
		t.emit(Report{Warning: true, Reason: ReasonSourceUnreachable, Message: "The source's kubelet does not say whether it " +
			"has given the pod away. Bring node " + t.id.PeerNode + " back, or delete this pod to give up."})
	case Cancelled:
		t.cancelled = true
		if !t.asked {
			t.abort(ReasonCancelled, e.Message, true)
		} else {
			t.fail(ReasonCancelled, e.Message, true)
		}
	case PeerFenced:
		t.fenced = true
		t.fail(ReasonSourceLost, "the source's node was lost before it gave the pod away: "+e.Message, false)
	case RuntimeFailed, RuntimeRestarted, StreamBroken, RoundsDone, Verified:
		// What was received was verified. If it is gone, the restore will say so.
	default:
		return targetEvent(e)
	}
	return true
}

// askCommit asks for the pod. It may be asked as often as it takes.
func (t *Target) askCommit() {
	t.asked = true
	t.emit(Call{Verb: VerbCommit})
}

func (t *Target) commitAnswered(e Answered) {
	refused := func(tell bool) {
		t.fail(ReasonSourceRefused, "the source did not give the pod away: "+e.Message, tell)
	}
	switch {
	case e.Verdict == VerdictOK:
		t.state, t.tries = TargetRestoring, 0
		t.stopTimer(TimerRetry)
		// The record is a help, not a need: a restart looks at the containers.
		t.emit(RestoreContainers{})
		t.write(string(TargetRestoring), false, "", "", false)
		t.setTimer(TimerDeadline, t.dl.Restore)
		t.emit(Report{Reason: ReasonRestoring, Message: "The pod's processes are being restored."})
	case e.Verdict == VerdictGone:
		refused(false)
	case e.Verdict == VerdictRefused && (e.Code == CodeAborted || e.Code == CodeReturned || e.Code == CodeNotDurable):
		refused(false)
	case e.Verdict == VerdictRefused && (e.Code == CodeWrongState || e.Code == CodeReleased):
		refused(true)
	default:
		// Nothing was said about the session; an earlier request may have been heard.
		t.later()
	}
}

func (t *Target) inRestoring(e Event) bool {
	switch e := e.(type) {
	case Restored:
		t.toRunning()
	case RuntimeFailed:
		if e.Op == OpRestore {
			t.fail(ReasonRestoreFailed, e.Message, true)
		}
	case TimerFired:
		if e.Timer == TimerDeadline {
			t.fail(ReasonDeadlineExceeded, "the restore took longer than "+t.dl.Restore.String(), true)
		}
	case PeerFenced:
		t.fenced = true
	case Cancelled, Answered, StreamBroken, RuntimeRestarted, JournalWritten, JournalFailed:
		// A clone that is deleted now is restored first and ends like any other pod.
	default:
		return targetEvent(e)
	}
	return true
}

// before has the rules of all states before the source is asked to commit.
func (t *Target) before(e Event) bool {
	switch e := e.(type) {
	case Cancelled:
		t.cancelled = true
		reason := ReasonCancelled
		if e.DryRun {
			reason = ReasonDryRun
		}
		t.abort(reason, e.Message, true)
	case PeerFenced:
		t.fenced = true
		t.abort(ReasonSourceLost, e.Message, false)
	case StreamBroken:
		t.abort(ReasonStreamFailed, "the stream broke: "+e.Message, true)
	case RuntimeFailed:
		reason, ours := map[Op]Reason{OpCreate: ReasonPrepareFailed, OpPrepareRestore: ReasonPrepareFailed, OpVerify: ReasonVerifyFailed}[e.Op]
		if ours {
			t.abort(reason, "the target failed to "+string(e.Op)+": "+e.Message, true)
		}
	case RuntimeRestarted:
		if t.armed {
			t.abort(ReasonRuntimeRestarted, "the target's runtime went away before the commit", true)
		}
	case TimerFired:
		if e.Timer == TimerDeadline {
			t.abort(ReasonDeadlineExceeded, "the migration stood still in state "+string(t.state), true)
		}
	default:
		return targetEvent(e)
	}
	return true
}

// targetEvent reports whether an event is one that a target may get at any time,
// because it is the late result of something that no longer matters.
func targetEvent(e Event) bool {
	switch e.(type) {
	case TimerFired, JournalWritten, JournalDeleted, JournalFailed, RuntimeFailed, RuntimeRestarted,
		StreamBroken, Cancelled, PeerFenced, Begun, Answered, ContainersCreated, RestorePrepared,
		RoundsDone, Verified, Restored, Inspected, RestoredStopped, RestoreFinished, OutcomeRecorded:
		return true
	}
	return false
}
