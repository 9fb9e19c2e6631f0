package migration

import "slices"

// The states of a source after the commit, and those that lead to an end.

func (s *Source) inGivenAway(e Event) bool {
	switch e := e.(type) {
	case CommitRequested:
		s.emit(Answer{Request: e.Request, Verb: VerbCommit, Frozen: s.facts})
	case DoneReported:
		s.pend(e.Request, VerbDone)
		s.letGo()
	case FailedReported:
		s.pend(e.Request, VerbFailed)
		s.takePodBack(e.Reason, e.Message)
	case PeerFenced:
		s.takePodBack(ReasonReturned, e.Message)
	case TargetAnswered:
		s.targetAnswered(e)
	case TimerFired:
		s.ask()
	case Cancelled, RuntimeRestarted, RuntimeFailed, StreamBroken, StreamSent, CheckpointFrozen:
		// Whatever happens here, the target may be running the pod.
	default:
		return s.refuseAny(e, CodeGivenAway, "the target owns the pod") || sourceEvent(e)
	}
	return true
}

// ask asks the target what became of the pod, and once more if no answer comes.
func (s *Source) ask() {
	s.emit(AskTarget{})
	s.setTimer(TimerDeadline, s.dl.Outcome)
}

func (s *Source) targetAnswered(e TargetAnswered) {
	switch e.Outcome {
	case OutcomeRestored:
		s.letGo()
	case OutcomeFailed:
		s.takePodBack(e.Reason, e.Message)
	case OutcomeGone:
		s.takePodBack(ReasonReturned, "the target's kubelet has neither the migration nor a container of the clone")
	case OutcomePending:
		s.silent, s.tries = false, 0
		s.stopTimer(TimerRetry)
		s.setTimer(TimerDeadline, s.dl.Outcome)
	default:
		if !s.silent {
			s.silent = true
			s.emit(Report{Warning: true, Reason: ReasonTargetUnreachable, Message: "The pod was given to its clone " +
				"and stays frozen: nobody says whether the clone runs. Bring node " + s.id.PeerNode +
				" back, or taint it as out of service once it is off."})
		}
		s.later()
	}
}

// letGo begins the end of the source: the clone runs.
func (s *Source) letGo() {
	s.state, s.durable = SourceReleasing, false
	s.endAsking()
	s.start(choreWrite, s.perform)
}

// takePodBack begins the return of ownership: no restored process exists.
func (s *Source) takePodBack(r Reason, msg string) {
	s.state, s.durable = SourceReturning, false
	s.reason, s.message = r, msg
	for _, id := range s.unpend(VerbCommit) {
		s.refuse(id, VerbCommit, CodeReturned, "the target gave up")
	}
	s.endAsking()
	s.start(choreWrite, s.perform)
}

func (s *Source) endAsking() {
	s.dropChores()
	s.stopTimer(TimerDeadline)
	s.stopTimer(TimerRetry)
}

func (s *Source) inReleasing(e Event) bool {
	switch e := e.(type) {
	case DoneReported:
		if s.durable {
			s.emit(Answer{Request: e.Request, Verb: VerbDone})
		} else {
			s.pend(e.Request, VerbDone)
		}
	case CheckpointFinished:
		s.stopped(choreFinish)
	case SourceMarked:
		s.stopped(choreMark)
	default:
		return s.ending(e, CodeReleased, "the clone runs, the source is being stopped")
	}
	return true
}

// stopped notes one of the two things that end a source.
func (s *Source) stopped(c chore) {
	if s.done(c) && s.todo == 0 {
		s.forget()
	}
}

// release stops the frozen processes and gives the pod its final status.
func (s *Source) release() {
	for _, id := range s.unpend(VerbDone) {
		s.emit(Answer{Request: id, Verb: VerbDone})
	}
	s.start(choreFinish|choreMark, s.perform)
}

func (s *Source) inReturning(e Event) bool {
	switch e := e.(type) {
	case FailedReported:
		if s.durable {
			s.emit(Answer{Request: e.Request, Verb: VerbFailed})
		} else {
			s.pend(e.Request, VerbFailed)
		}
	case AbortRequested:
		s.emit(Answer{Request: e.Request, Verb: VerbAbort})
	case CheckpointFinished:
		s.thawed(ReasonReturned, "The clone could not be restored; the pod runs on here")
	default:
		return s.ending(e, CodeReturned, "the source owns the pod again")
	}
	return true
}

// thaw lets the processes run on.
func (s *Source) thaw() {
	for _, id := range s.unpend(VerbFailed) {
		s.emit(Answer{Request: id, Verb: VerbFailed})
	}
	s.start(choreFinish, s.perform)
}

func (s *Source) thawed(r Reason, said string) {
	if !s.done(choreFinish) {
		return
	}
	s.unguard()
	if s.message != "" {
		said += ": " + s.message
	}
	s.emit(Report{Warning: true, Reason: r, Message: said + "."})
	s.forget()
}

// abort ends a migration before the commit.
func (s *Source) abort(r Reason, msg string) {
	rewrite := s.state == SourceGiving && !s.durable
	s.reason, s.message = r, msg
	s.stopTimer(TimerDeadline)
	s.stopTimer(TimerRetry)
	for _, p := range s.pending {
		s.refuse(p.id, p.verb, CodeAborted, msg)
	}
	s.pending = nil
	if s.cut {
		s.cut = false
		s.emit(CutStream{})
	}
	if !s.recorded {
		s.state = SourceAborted
		return
	}
	s.state = SourceAborting
	if rewrite {
		s.start(choreWrite, s.perform)
		return
	}
	s.durable = true
	s.thaw()
}

func (s *Source) inAborting(e Event) bool {
	switch e := e.(type) {
	case FailedReported:
		s.emit(Answer{Request: e.Request, Verb: VerbFailed})
	case AbortRequested:
		s.emit(Answer{Request: e.Request, Verb: VerbAbort})
	case CheckpointFinished:
		s.thawed(ReasonAborted, "The migration was given up; the pod runs on here")
	default:
		return s.ending(e, CodeAborted, s.message)
	}
	return true
}

// ending has the rules that Releasing, Returning and Aborting share.
func (s *Source) ending(e Event, code Code, msg string) bool {
	switch e := e.(type) {
	case JournalWritten:
		if e.Seq == s.seq && s.done(choreWrite) {
			s.durable, s.tries = true, 0
			if s.state == SourceReleasing {
				s.release()
			} else {
				s.thaw()
			}
		}
	case JournalFailed:
		if e.Seq == s.seq {
			for _, p := range s.pending {
				s.refuse(p.id, p.verb, CodeNotDurable, e.Message)
			}
			s.pending = nil
			s.notDone(choreWrite|choreDelete, "the journal cannot be written: "+e.Message)
		}
	case JournalDeleted:
		if e.Seq == s.seq && s.done(choreDelete) {
			s.finish()
		}
	case RuntimeFailed:
		switch e.Op {
		case OpFinishCheckpoint:
			s.notDone(choreFinish, "the runtime does not finish the checkpoint: "+e.Message)
		case OpMark:
			s.notDone(choreMark, "the pod's status cannot be written: "+e.Message)
		}
	case TimerFired:
		if e.Timer == TimerRetry {
			s.again(s.perform)
		}
	case Cancelled, RuntimeRestarted, StreamBroken, StreamSent, CheckpointPrepared, CheckpointFrozen,
		CheckpointFinished, SourceMarked, TargetAnswered, PeerFenced:
		// Decided already.
	default:
		return s.refuseAny(e, code, msg)
	}
	return true
}

func (s *Source) perform(c chore) {
	switch c {
	case choreFinish:
		o := FinishResume
		if s.state == SourceReleasing {
			o = FinishStop
		}
		s.emit(FinishCheckpoint{Outcome: o})
	case choreMark:
		s.emit(MarkMigrated{})
	case choreWrite:
		s.write(string(s.state), true, s.reason, s.message, false)
	case choreDelete:
		s.deleteRecord()
	}
}

func (s *Source) notDone(c chore, msg string) {
	if _, say := s.failed(c); say {
		s.emit(Report{Warning: true, Reason: ReasonRetrying, Message: "The end of a migration waits: " + msg})
	}
}

// forget removes the record; the session counts until that is durable.
func (s *Source) forget() { s.start(choreDelete, s.perform) }

func (s *Source) finish() {
	s.stopTimer(TimerDeadline)
	s.stopTimer(TimerRetry)
	switch s.state {
	case SourceReleasing:
		s.state = SourceReleased
		s.unguard()
	case SourceReturning:
		s.state = SourceReturned
	default:
		s.state = SourceAborted
	}
}

func (s *Source) guard() {
	s.guarded = true
	s.emit(GuardPod{}, SuspendProbes{})
}

func (s *Source) unguard() {
	if s.guarded {
		s.guarded = false
		s.emit(ResumeProbes{}, UnguardPod{})
	}
}

func (s *Source) inTerminal(e Event) bool {
	yes := map[SourceState][]Verb{
		SourceReleased: {VerbDone}, SourceReturned: {VerbFailed, VerbAbort}, SourceAborted: {VerbFailed, VerbAbort},
	}[s.state]
	if id, verb, ok := request(e); ok && slices.Contains(yes, verb) {
		s.emit(Answer{Request: id, Verb: verb})
		return true
	}
	code := map[SourceState]Code{
		SourceReleased: CodeReleased, SourceReturned: CodeReturned, SourceAborted: CodeAborted,
	}[s.state]
	return s.refuseAny(e, code, "the migration has ended") || sourceEvent(e)
}
