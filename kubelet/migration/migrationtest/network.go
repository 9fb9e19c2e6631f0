package migrationtest

import (
	m "podmig.dev/podmig/kubelet/migration"
)

func (w *World) send(msg *message) { w.net = append(w.net, msg) }

// asker is the host that waits for the answer, server the one that gives it.
func (w *World) asker(msg *message) *host {
	if msg.verb == "" {
		return w.S
	}
	return w.T
}

// deliver hands a request to its server. A repeated delivery is what a client's
// retry or a proxy makes of one request.
func (w *World) deliver(msg *message) {
	msg.asked = true
	if msg.verb == "" {
		w.tellOutcome(msg)
		return
	}
	h := w.S
	if !h.up {
		msg.answered, msg.verdict = true, m.VerdictNoAnswer
		return
	}
	if h.source == nil && msg.verb == m.VerbOpen {
		if w.Source != Running || w.Marked || w.SourceDeleted {
			msg.answered, msg.verdict, msg.code = true, m.VerdictRefused, "not-running"
			return
		}
		h.source = m.NewSource(identity(m.SideSource), m.Deadlines{})
	}
	if h.source == nil {
		msg.answered, msg.verdict = true, m.VerdictGone
		return
	}
	w.nextReq++
	id := w.nextReq
	msg.id = id
	w.requests[id] = msg
	switch msg.verb {
	case m.VerbOpen:
		h.step(m.OpenRequested{Request: id})
	case m.VerbStream:
		h.step(m.StreamRequested{Request: id})
	case m.VerbFreeze:
		h.step(m.FreezeRequested{Request: id})
	case m.VerbCommit:
		h.step(m.CommitRequested{Request: id})
	case m.VerbDone:
		h.step(m.DoneReported{Request: id})
	case m.VerbFailed:
		h.step(m.FailedReported{Request: id, Reason: msg.reason, Message: msg.text})
	case m.VerbAbort:
		h.step(m.AbortRequested{Request: id, Reason: msg.reason, Message: msg.text})
	}
}

// answer is the server's answer; it still has to travel.
func (w *World) answer(a m.Answer) {
	msg := w.requests[a.Request]
	if msg == nil {
		w.violate("answer to a request that nobody made: %s", a)
		return
	}
	delete(w.requests, a.Request)
	msg.answered, msg.verdict, msg.code, msg.text = true, m.VerdictOK, a.Code, a.Message
	if a.Code != "" {
		msg.verdict = m.VerdictRefused
	}
}

// tellOutcome is the target's kubelet, asked by the source's.
func (w *World) tellOutcome(msg *message) {
	h := w.T
	msg.answered = true
	switch {
	case !h.up:
		// The source's kubelet then looks at the clone's condition, which only the
		// target's node can write.
		msg.outcome.Outcome = map[string]m.Outcome{"True": m.OutcomeRestored, "False": m.OutcomeFailed, "": m.OutcomeUnknown}[w.Recorded]
	case h.target != nil:
		msg.outcome.Outcome, msg.outcome.Reason, msg.outcome.Message = h.target.Outcome()
	case w.Recorded == "True":
		msg.outcome.Outcome = m.OutcomeRestored
	case w.Recorded == "False":
		msg.outcome.Outcome = m.OutcomeFailed
	case h.record == nil && w.Clone == Absent:
		msg.outcome.Outcome = m.OutcomeGone
	default:
		msg.outcome.Outcome = m.OutcomePending
	}
}

// hear brings an answer to the one who asked.
func (w *World) hear(msg *message) {
	h := w.asker(msg)
	w.drop(msg)
	if !h.up {
		return
	}
	if msg.verb == "" {
		h.step(msg.outcome)
		return
	}
	if msg.verb == m.VerbStream {
		if msg.verdict != m.VerdictOK {
			h.step(m.StreamBroken{Message: string(msg.verdict) + " " + string(msg.code)})
		} else {
			h.results = append(h.results, m.RoundsDone{})
		}
		return
	}
	h.step(m.Answered{Verb: msg.verb, Verdict: msg.verdict, Code: msg.code, Message: msg.text})
}

// lose takes a request or an answer off the network; the asker hears that.
func (w *World) lose(msg *message) {
	msg.verdict, msg.code, msg.outcome = m.VerdictNoAnswer, "", m.TargetAnswered{Outcome: m.OutcomeUnknown}
	if msg.verb == m.VerbStream && w.stream == flowing {
		w.breakStream(w.T)
	}
	w.hear(msg)
}

func (w *World) drop(msg *message) {
	msg.closed = true
	for i, x := range w.net {
		if x == msg {
			w.net = append(w.net[:i:i], w.net[i+1:]...)
			return
		}
	}
}

// breakStream ends the stream; by is the side that knows already.
func (w *World) breakStream(by *host) {
	if w.stream != flowing && w.stream != complete {
		return
	}
	w.stream = broken
	for _, h := range []*host{w.S, w.T} {
		if h != by && h.up {
			h.results = append(h.results, m.StreamBroken{Message: "connection lost"})
		}
	}
}
