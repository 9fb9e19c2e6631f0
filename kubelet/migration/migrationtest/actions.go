package migrationtest

import (
	"slices"
	"time"

	m "podmig.dev/podmig/kubelet/migration"
)

// Actions are all things that can happen next, in a fixed order, normal ones first.
func (w *World) Actions() []Action {
	var normal, rest []Action
	add := func(k Kind, name string, do func()) {
		a := Action{Name: name, Kind: k, do: do}
		if k == Normal {
			normal = append(normal, a)
		} else {
			rest = append(rest, a)
		}
	}
	timed := func(due time.Duration, name string, do func()) {
		rest = append(rest, Action{Name: name, Kind: Time, do: do, due: due})
	}
	for _, h := range []*host{w.S, w.T} {
		h.actions(add, timed)
	}
	for _, msg := range slices.Clone(w.net) {
		w.messageActions(msg, add)
	}
	w.strayActions(add)
	if w.stream == flowing || w.stream == complete {
		add(Fault, "the stream breaks", func() { w.breakStream(nil) })
	}
	if !w.CloneDeleted {
		add(User, "the clone is deleted", func() {
			w.CloneDeleted = true
			if w.T.up {
				w.T.step(m.Cancelled{Message: "the clone pod was deleted"})
			}
		})
	}
	if !w.SourceDeleted {
		add(User, "the source is deleted", func() {
			w.SourceDeleted = true
			if w.S.up {
				w.S.step(m.Cancelled{Message: "the source pod was deleted"})
			}
		})
	}
	return append(normal, rest...)
}

// strayActions are requests that the target's machine never made: a confused or
// compromised target. It may spoil its own migration and must not get a second copy
// to run. (Of done and failed it has to be believed once it owns the pod.)
func (w *World) strayActions(add func(Kind, string, func())) {
	if !w.S.up {
		return
	}
	verbs := []m.Verb{m.VerbOpen, m.VerbStream, m.VerbFreeze, m.VerbCommit, m.VerbAbort}
	if s := w.S.source; s == nil || s.Owns() {
		verbs = append(verbs, m.VerbDone, m.VerbFailed)
	}
	for _, v := range verbs {
		add(Fault, "a stray "+string(v)+" arrives", func() {
			w.deliver(&message{name: string(v), verb: v, reason: m.ReasonCancelled, closed: true})
		})
	}
}

func (w *World) messageActions(msg *message, add func(Kind, string, func())) {
	if msg.closed {
		// Nobody waits for the answer any more; the request may still arrive.
		add(Normal, "deliver "+msg.name, func() { w.deliver(msg) })
		add(Fault, "the "+msg.name+" vanishes", func() { w.drop(msg) })
		return
	}
	if !msg.answered {
		if !msg.asked {
			add(Normal, "deliver "+msg.name, func() { w.deliver(msg) })
			add(Fault, "the request "+msg.name+" is lost", func() { msg.asked = true; w.lose(msg) })
			add(Fault, "the request "+msg.name+" is late: the caller gave up, it still arrives", func() {
				late := &message{name: "late " + msg.name, verb: msg.verb, reason: msg.reason, text: msg.text}
				w.lose(msg)
				msg.asked = true
				if late.verb != "" && late.verb != m.VerbStream {
					late.closed = true
					w.send(late)
				}
			})
		} else {
			add(Fault, "the caller of "+msg.name+" loses the connection while it waits", func() {
				if msg.verb == m.VerbStream && w.S.up {
					w.S.results = append(w.S.results, m.StreamBroken{Message: "the reader went away"})
				}
				w.lose(msg)
			})
		}
		return
	}
	add(Normal, "answer "+msg.name, func() { w.hear(msg) })
	add(Fault, "the answer to "+msg.name+" is lost", func() { w.lose(msg) })
	if msg.verb != "" && msg.verb != m.VerbStream && msg.id != 0 {
		add(Fault, "the request "+msg.name+" arrives a second time", func() {
			w.deliver(&message{name: msg.name, verb: msg.verb, reason: msg.reason, text: msg.text, closed: true})
		})
	}
}

func (h *host) actions(add func(Kind, string, func()), timed func(time.Duration, string, func())) {
	w := h.w
	side := string(h.side)
	if h.gone {
		return
	}
	if !h.up {
		add(Normal, side+"'s kubelet comes back", h.restart)
		add(Fault, side+"'s node is switched off for good", h.switchOff)
		if h == w.T && w.Recorded == "" {
			add(Fault, "target's node loses its disk", h.loseDisk)
		}
		return
	}
	if h.peer().gone && !h.fenced {
		add(Normal, side+" hears that the other node is off", func() {
			h.fenced = true
			h.step(m.PeerFenced{Message: "the node is out of service"})
		})
	}
	for i, e := range h.results {
		add(Normal, side+" hears "+e.String(), func() {
			h.results = slices.Delete(h.results, i, i+1)
			h.step(e)
		})
	}
	for _, q := range []struct {
		name  string
		tasks *[]task
	}{{"journal", &h.journal}, {"runtime", &h.runtime}, {"API", &h.api}} {
		if len(*q.tasks) == 0 || (q.name == "runtime" && h.blocked()) {
			continue
		}
		t := (*q.tasks)[0]
		doing := side + "'s " + q.name + ": " + t.name
		take := func(do func() m.Event) func() {
			return func() {
				*q.tasks = (*q.tasks)[1:]
				if e := do(); e != nil {
					h.results = append(h.results, e)
				}
			}
		}
		add(Normal, doing, take(t.do))
		for _, f := range t.fail {
			add(Fault, doing+" fails: "+f.name, take(f.do))
		}
		add(Fault, side+"'s kubelet dies after "+q.name+": "+t.name, func() {
			*q.tasks = (*q.tasks)[1:]
			t.do()
			h.crash()
		})
	}
	for _, timer := range []m.Timer{m.TimerRetry, m.TimerDeadline} {
		if a, ok := h.timers[timer]; ok {
			timed(a.due, side+"'s "+string(timer)+" passes", func() {
				delete(h.timers, timer)
				h.step(m.TimerFired{Timer: timer, Gen: a.gen})
			})
		}
	}
	add(Fault, side+"'s kubelet dies", h.crash)
	add(Fault, side+"'s runtime dies", h.runtimeDies)
	if h == w.S && !w.Guarded && w.Source == Dead && !w.Marked {
		add(Normal, "source's kubelet starts the pod's containers again", func() { w.Source = Running })
	}
}

// blocked: verification waits for the end of the stream, one way or the other.
func (h *host) blocked() bool {
	return h.runtime[0].name == m.VerifyRestore{}.String() && h.w.stream != complete && h.w.stream != broken &&
		len(h.runtime) == 1
}

// crash is kill -9 of the kubelet: what it had in memory is gone, what it had asked
// the runtime for is cancelled.
func (h *host) crash() {
	w := h.w
	h.up = false
	h.source, h.target = nil, nil
	h.journal, h.runtime, h.api, h.results = nil, nil, nil, nil
	h.timers = map[m.Timer]alarm{}
	if h == w.S {
		w.Guarded, w.Suspended = false, false
		w.requests = map[m.RequestID]*message{}
	}
	w.breakStream(h)
	for _, msg := range slices.Clone(w.net) {
		if w.asker(msg) == h {
			msg.closed = true
			if msg.asked {
				w.drop(msg)
			}
		} else if msg.asked && !msg.answered {
			msg.answered, msg.verdict, msg.outcome.Outcome = true, m.VerdictNoAnswer, m.OutcomeUnknown
		}
	}
}

// switchOff takes the node away with everything that runs on it.
func (h *host) switchOff() {
	h.gone = true
	h.w.say(string(h.side) + ": its processes end with the node")
	if h == h.w.S {
		h.w.Source = Dead
	} else if h.w.Clone == Running || h.w.Clone == Partial {
		h.w.Clone = Dead
	}
	delete(h.w.sessions, string(h.side))
}

// loseDisk is a node that is set up anew under its old name. The source's cannot do
// that here: without its record its kubelet would start the pod's containers again.
func (h *host) loseDisk() {
	h.record, h.wiped = nil, true
	h.w.Clone = Absent
	delete(h.w.sessions, string(h.side))
}

func (h *host) peer() *host {
	if h == h.w.S {
		return h.w.T
	}
	return h.w.S
}

// restart is a kubelet that comes back and reads its journal before anything else.
func (h *host) restart() {
	w := h.w
	h.up, h.fenced = true, false
	if h.record == nil {
		w.say(string(h.side) + ": restarted without a record")
		if h == w.T && w.Recorded == "" {
			h.begin()
			if w.CloneDeleted && h.target != nil {
				h.step(m.Cancelled{Message: "the clone pod was deleted"})
			}
		}
		return
	}
	var err error
	if h == w.S {
		h.source, err = m.LoadSource(*h.record, m.Deadlines{})
	} else {
		h.target, err = m.LoadTarget(*h.record, m.Deadlines{})
	}
	if err != nil {
		w.violate("%s: %v", h.side, err)
		return
	}
	h.step(m.Restarted{})
	if h == w.T && (w.CloneDeleted || w.Recorded == "False") || h == w.S && w.SourceDeleted {
		h.step(m.Cancelled{Message: "the pod was deleted"})
	}
}

// runtimeDies is kill -9 of the runtime, which comes back at once: calls under way
// fail, the first may have been carried out. Processes and sessions stay.
func (h *host) runtimeDies() {
	ops := h.runtime
	h.runtime = nil
	for _, t := range ops {
		if len(t.fail) > 0 {
			h.results = append(h.results, t.fail[0].do())
		}
	}
	h.w.breakStream(nil)
	h.step(m.RuntimeRestarted{Message: "killed"})
}
