package migration

// The states of a target behind which there is only one way to go.

// toRunning: every process runs. From here there is no way back to the source.
func (t *Target) toRunning() {
	t.state = TargetRunning
	t.dropChores()
	t.stopTimer(TimerDeadline)
	t.stopTimer(TimerRetry)
	t.start(choreWrite, t.perform)
}

// running: and a restart would know it.
func (t *Target) running() {
	t.durable, t.tries = true, 0
	t.emit(AdmitRestored{})
	t.start(choreRecord|choreRelease, t.perform)
	if !t.fenced {
		t.start(choreTell, t.perform)
	}
}

func (t *Target) inRunning(e Event) bool {
	switch e := e.(type) {
	case JournalWritten:
		if e.Seq == t.seq && t.done(choreWrite) {
			t.running()
		}
	case Answered:
		if e.Verb == VerbDone && t.todo&choreTell != 0 {
			t.doneAnswered(e)
		}
	case Cancelled:
		// It ends like any other pod.
	default:
		return t.ending(e)
	}
	return true
}

func (t *Target) doneAnswered(e Answered) {
	switch {
	case e.Verdict == VerdictOK, e.Verdict == VerdictGone:
		t.finished(choreTell)
	case e.Verdict == VerdictRefused && (e.Code == CodeReturned || e.Code == CodeAborted):
		// Somebody with authority gave the pod back to the source while this node was
		// thought to be off. Two copies run, and this one is the wrong one.
		t.fail(ReasonOwnershipRevoked, "the source's node has taken the pod back: "+e.Message, false)
	default:
		t.notDone(choreTell, "the source does not take notice that the clone runs: "+e.Message)
	}
}

func (t *Target) inInspecting(e Event) bool {
	switch e := e.(type) {
	case Inspected:
		if !t.done(choreInspect) {
			break
		}
		switch {
		case e.Found == FoundAll:
			t.toRunning()
		case e.Found != FoundNone:
			t.fail(ReasonRestoreFailed, "the kubelet restarted during the restore and found it incomplete", true)
		case t.fenced:
			t.fail(ReasonSourceLost, "the source's node was lost before it gave the pod away", false)
		case t.cancelled:
			t.fail(ReasonCancelled, "the clone was deleted before it was restored", true)
		default:
			t.state, t.tries = TargetCommitting, 0
			t.stopTimer(TimerRetry)
			t.askCommit()
			t.setTimer(TimerDeadline, t.dl.Commit)
		}
	case Cancelled:
		t.cancelled = true
	case PeerFenced:
		t.fenced = true
	case RuntimeFailed:
		if e.Op == OpInspect {
			t.notDone(choreInspect, "the runtime does not say what became of the containers: "+e.Message)
		}
	case TimerFired:
		if e.Timer == TimerRetry {
			t.again(t.perform)
		}
	default:
		return targetEvent(e)
	}
	return true
}

// abort ends a migration for which the source was never asked to commit: nothing was
// restored and the source may run whatever it likes.
func (t *Target) abort(r Reason, msg string, tell bool) {
	t.reason, t.message = r, msg
	began := t.state != TargetFresh
	t.state = TargetAborting
	t.dropChores()
	t.stopTimer(TimerRetry)
	t.stopTimer(TimerDeadline)
	if t.receiving {
		t.receiving = false
		t.emit(CutStream{})
	}
	if tell && began && !t.fenced {
		t.setTimer(TimerDeadline, t.dl.Abort)
		t.start(choreTell, t.perform)
	}
	if t.armed {
		t.start(choreRelease, t.perform)
	}
	t.start(choreRecord, t.perform)
}

func (t *Target) inAborting(e Event) bool {
	switch e := e.(type) {
	case Answered:
		if e.Verb != VerbAbort {
			break
		}
		switch {
		case e.Verdict == VerdictNoAnswer:
			t.notDone(choreTell, "the source does not answer: "+e.Message)
		case e.Verdict == VerdictRefused && e.Code == CodeGivenAway:
			// It says that it gave away what was never asked for. Then it wants to hear
			// that nothing runs here.
			t.fail(t.reason, t.message, true)
		default:
			t.finished(choreTell)
		}
	case TimerFired:
		if e.Timer == TimerDeadline {
			// The source's own deadlines do the rest.
			t.finished(choreTell)
			break
		}
		return t.ending(e)
	default:
		return t.ending(e)
	}
	return true
}

// fail ends a migration for which the source may have given the pod away. First of
// all no restored process may exist; only then the source is told.
func (t *Target) fail(r Reason, msg string, tell bool) {
	t.state = TargetFailing
	t.reason, t.message, t.tell, t.cleared, t.durable = r, msg, tell, false, false
	t.dropChores()
	t.stopTimer(TimerDeadline)
	t.stopTimer(TimerRetry)
	t.start(choreWrite, t.perform)
}

func (t *Target) inFailing(e Event) bool {
	switch e := e.(type) {
	case JournalWritten:
		if e.Seq == t.seq && t.done(choreWrite) {
			t.start(choreClear, t.perform)
		}
	case JournalFailed:
		if e.Seq != t.seq {
			break
		}
		if t.done(choreWrite) {
			// A full disk must not keep the source frozen. Without the record a restart asks
			// to commit once more before it restores anything, and is refused: the source
			// does not run before its own record says so.
			t.start(choreClear, t.perform)
			break
		}
		return t.ending(e)
	case RestoredStopped:
		if !t.done(choreClear) {
			break
		}
		t.cleared, t.tries = true, 0
		if t.tell && !t.fenced {
			t.start(choreTell, t.perform)
		}
		t.start(choreRecord|choreRelease, t.perform)
	case Answered:
		if e.Verb != VerbFailed {
			break
		}
		switch {
		case e.Verdict == VerdictNoAnswer, e.Verdict == VerdictRefused && !over(e.Code):
			t.notDone(choreTell, "the source does not take notice that the restore failed: "+e.Message)
		default:
			t.finished(choreTell)
		}
	default:
		return t.ending(e)
	}
	return true
}

// over: a refused report of failure after which there is nothing left to report.
func over(c Code) bool { return c == CodeAborted || c == CodeReturned || c == CodeReleased }

// ending has the rules that Running, Aborting and Failing share.
func (t *Target) ending(e Event) bool {
	switch e := e.(type) {
	case JournalDeleted:
		if e.Seq == t.seq && t.done(choreDelete) {
			t.finish()
		}
	case JournalFailed:
		if e.Seq == t.seq {
			t.notDone(choreWrite|choreDelete, "the journal cannot be written: "+e.Message)
		}
	case RuntimeFailed:
		switch e.Op {
		case OpStopRestored:
			t.notDone(choreClear, "the runtime does not confirm that no restored process exists: "+e.Message)
		case OpFinishRestore:
			t.notDone(choreRelease, "the runtime does not release the checkpoint: "+e.Message)
		case OpRecordOutcome:
			t.notDone(choreRecord, "the pod's status cannot be written: "+e.Message)
		}
	case OutcomeRecorded:
		t.finished(choreRecord)
	case RestoreFinished:
		t.finished(choreRelease)
	case PeerFenced:
		t.fenced = true
		t.finished(choreTell)
	case TimerFired:
		if e.Timer == TimerRetry {
			t.again(t.perform)
		}
	default:
		return targetEvent(e)
	}
	return true
}

// finished notes a chore and forgets the session after the last.
func (t *Target) finished(c chore) {
	if !t.done(c) || t.todo != 0 || (t.state == TargetFailing && !t.cleared) || (t.state == TargetRunning && !t.durable) {
		return
	}
	if t.recorded {
		t.start(choreDelete, t.perform)
	} else {
		t.finish()
	}
}

func (t *Target) finish() {
	t.stopTimer(TimerDeadline)
	t.stopTimer(TimerRetry)
	if t.state == TargetRunning {
		t.state = TargetDone
	} else {
		t.state = TargetFailed
	}
}

func (t *Target) perform(c chore) {
	switch c {
	case choreTell:
		verb := map[TargetState]Verb{TargetRunning: VerbDone, TargetAborting: VerbAbort, TargetFailing: VerbFailed}[t.state]
		if verb == VerbDone {
			t.emit(Call{Verb: verb})
		} else {
			t.emit(Call{Verb: verb, Reason: t.reason, Message: t.message})
		}
	case choreRecord:
		if t.state == TargetRunning {
			t.emit(RecordOutcome{Cloned: true, Reason: ReasonCloned, Message: "The pod runs with the state of " + t.id.SourcePod + "."})
		} else {
			t.emit(RecordOutcome{Reason: t.reason, Message: t.message})
		}
	case choreRelease:
		t.emit(FinishRestore{})
	case choreClear:
		t.emit(StopRestored{})
	case choreInspect:
		t.emit(InspectContainers{})
	case choreWrite:
		t.write(string(t.state), true, t.reason, t.message, t.tell)
	case choreDelete:
		t.deleteRecord()
	}
}

func (t *Target) notDone(c chore, msg string) {
	if _, say := t.failed(c); say {
		t.emit(Report{Warning: true, Reason: ReasonRetrying, Message: "The end of a migration waits: " + msg})
	}
}

func (t *Target) inTerminal(e Event) bool { return targetEvent(e) }
