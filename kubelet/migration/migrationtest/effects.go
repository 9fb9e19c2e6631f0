package migrationtest

import (
	m "podmig.dev/podmig/kubelet/migration"
)

// carryOut queues one effect of a machine, or does it at once where nothing can
// come in between.
func (h *host) carryOut(e m.Effect) {
	w := h.w
	switch e := e.(type) {
	case m.WriteJournal:
		rec := e.Record
		h.journal = append(h.journal, task{
			name: "write " + rec.State,
			do:   func() m.Event { h.record = &rec; return m.JournalWritten{Seq: e.Seq} },
			fail: []fault{
				{"disk full", func() m.Event { return m.JournalFailed{Seq: e.Seq, Message: "disk full"} }},
				{"sync failed, written", func() m.Event {
					h.record = &rec
					return m.JournalFailed{Seq: e.Seq, Uncertain: true, Message: "sync failed"}
				}},
				{"sync failed, not written", func() m.Event {
					return m.JournalFailed{Seq: e.Seq, Uncertain: true, Message: "sync failed"}
				}},
			},
		})
	case m.DeleteJournal:
		h.journal = append(h.journal, task{
			name: "delete record",
			do:   func() m.Event { h.record = nil; return m.JournalDeleted{Seq: e.Seq} },
			fail: []fault{
				{"read-only disk", func() m.Event { return m.JournalFailed{Seq: e.Seq, Message: "read-only"} }},
				{"sync failed, deleted", func() m.Event {
					h.record = nil
					return m.JournalFailed{Seq: e.Seq, Uncertain: true, Message: "sync failed"}
				}},
			},
		})
	case m.SetTimer:
		h.timers[e.Timer] = alarm{e.Gen, w.now + e.After}
	case m.StopTimer:
		delete(h.timers, e.Timer)
	case m.Report, m.AdmitRestored:
	case m.Answer:
		w.answer(e)
	case m.GuardPod:
		w.Guarded = true
	case m.UnguardPod:
		w.Guarded = false
	case m.SuspendProbes:
		w.Suspended = true
	case m.ResumeProbes:
		w.Suspended = false
	case m.SendStream:
		w.answer(m.Answer{Request: e.Request, Verb: m.VerbStream})
		w.stream = flowing
	case m.CutStream:
		w.breakStream(h)
	case m.ReceiveStream:
		w.send(&message{name: "stream", verb: m.VerbStream})
	case m.Call:
		w.send(&message{name: string(e.Verb), verb: e.Verb, reason: e.Reason, text: e.Message})
	case m.AskTarget:
		w.send(&message{name: "outcome?"})
	default:
		if t, ok := h.runtimeTask(e); ok {
			h.runtime = append(h.runtime, t)
		} else if t, ok := h.apiTask(e); ok {
			h.api = append(h.api, t)
		} else {
			w.violate("%s: nobody carries out %s", h.side, e)
		}
	}
}

// failed makes the faults of a runtime call: it was not carried out, or it was and
// nobody heard.
func failed(op m.Op, do func()) []fault {
	say := m.RuntimeFailed{Op: op, Message: "injected"}
	return []fault{
		{"not done", func() m.Event { return say }},
		{"done, but reported as failed", func() m.Event { do(); return say }},
	}
}

func call(name string, op m.Op, ok m.Event, do func()) task {
	return task{name: name, do: func() m.Event { do(); return ok }, fail: failed(op, do)}
}

func (h *host) runtimeTask(e m.Effect) (task, bool) {
	w := h.w
	set := func(p *Procs, v Procs, if_ ...Procs) func() {
		return func() {
			for _, was := range if_ {
				if *p == was {
					*p = v
				}
			}
		}
	}
	open := func() { w.sessions[string(h.side)] = true }
	end := func() { delete(w.sessions, string(h.side)) }
	switch e := e.(type) {
	case m.PrepareCheckpoint:
		return call(e.String(), m.OpPrepareCheckpoint, m.CheckpointPrepared{Address: "unix:///s"}, open), true
	case m.FreezeCheckpoint:
		freeze := set(&w.Source, Frozen, Running)
		t := call(e.String(), m.OpFreeze, m.CheckpointFrozen{}, freeze)
		t.do = func() m.Event {
			freeze()
			if w.stream != flowing || w.Source != Frozen {
				return m.RuntimeFailed{Op: m.OpFreeze, Message: "nobody reads the stream"}
			}
			w.stream = complete
			h.results = append(h.results, m.StreamSent{})
			return m.CheckpointFrozen{}
		}
		return t, true
	case m.FinishCheckpoint:
		do := func() { end(); set(&w.Source, Running, Frozen)() }
		if e.Outcome == m.FinishStop {
			do = func() {
				end()
				if !w.cloneRan {
					w.violate("the source is stopped and the clone never ran")
				}
				set(&w.Source, Dead, Frozen, Running)()
			}
		}
		return call(e.String(), m.OpFinishCheckpoint, m.CheckpointFinished{}, do), true

	case m.CreateContainers:
		t := call(e.String(), m.OpCreate, m.ContainersCreated{SandboxID: "sb2", Containers: []m.Container{{Name: "redis", ID: "c2"}}}, func() {})
		return t, true
	case m.PrepareRestore:
		return call(e.String(), m.OpPrepareRestore, m.RestorePrepared{Address: "unix:///t"}, open), true
	case m.VerifyRestore:
		t := call(e.String(), m.OpVerify, m.Verified{}, func() {})
		t.do = func() m.Event {
			if w.stream != complete {
				return m.RuntimeFailed{Op: m.OpVerify, Message: "the stream is not whole"}
			}
			return m.Verified{}
		}
		return t, true
	case m.RestoreContainers:
		// A runtime refuses to restore into what is not CREATED.
		restore := func() { set(&w.Clone, Running, Absent)(); w.cloneRan = w.cloneRan || w.Clone == Running }
		t := call(e.String(), m.OpRestore, m.Restored{}, restore)
		t.do = func() m.Event {
			if w.Clone != Absent {
				return m.RuntimeFailed{Op: m.OpRestore, Message: "the container is not in state CREATED"}
			}
			restore()
			return m.Restored{}
		}
		t.fail = append(t.fail, fault{"one container restored", func() m.Event {
			set(&w.Clone, Partial, Absent)()
			return m.RuntimeFailed{Op: m.OpRestore, Message: "injected"}
		}})
		return t, true
	case m.InspectContainers:
		t := call(e.String(), m.OpInspect, nil, func() {})
		t.do = func() m.Event {
			switch w.Clone {
			case Absent:
				return m.Inspected{Found: m.FoundNone}
			case Running:
				return m.Inspected{Found: m.FoundAll}
			}
			return m.Inspected{Found: m.FoundMixed}
		}
		return t, true
	case m.StopRestored:
		return call(e.String(), m.OpStopRestored, m.RestoredStopped{}, set(&w.Clone, Dead, Running, Partial)), true
	case m.FinishRestore:
		return call(e.String(), m.OpFinishRestore, m.RestoreFinished{}, end), true
	}
	return task{}, false
}

func (h *host) apiTask(e m.Effect) (task, bool) {
	w := h.w
	switch e := e.(type) {
	case m.MarkMigrated:
		do := func() {
			if !w.cloneRan {
				w.violate("the source is marked and the clone never ran")
			}
			w.Marked = true
		}
		return call(e.String(), m.OpMark, m.SourceMarked{}, do), true
	case m.RecordOutcome:
		do := func() {
			w.Recorded = ifElse(e.Cloned, "True", "False")
			if !e.Cloned && (w.Clone == Running || w.Clone == Partial) {
				w.violate("a running clone is recorded as failed")
			}
			if e.Cloned && w.Clone != Running {
				w.violate("a clone that does not run is recorded as cloned")
			}
		}
		return call(e.String(), m.OpRecordOutcome, m.OutcomeRecorded{}, do), true
	}
	return task{}, false
}

func ifElse(c bool, a, b string) string {
	if c {
		return a
	}
	return b
}
