package migration

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// rewrite is the flag that datadriven, which the transcripts use, defines too.
func rewrite() bool { return flag.Lookup("rewrite").Value.String() == "true" }

// sourceEvents has every event that a source can get, with the variants that make a
// difference.
func sourceEvents(m *machine) []Event {
	return append(commonEvents(m),
		OpenRequested{Request: 90}, StreamRequested{Request: 91}, FreezeRequested{Request: 92}, CommitRequested{Request: 93},
		DoneReported{Request: 94}, FailedReported{Request: 95, Reason: ReasonRestoreFailed, Message: "no"},
		AbortRequested{Request: 96, Reason: ReasonVerifyFailed, Message: "no"},
		CheckpointPrepared{Address: "unix:///a"}, CheckpointFrozen{}, StreamSent{}, CheckpointFinished{}, SourceMarked{},
		TargetAnswered{Outcome: OutcomePending}, TargetAnswered{Outcome: OutcomeRestored}, TargetAnswered{Outcome: OutcomeFailed},
		TargetAnswered{Outcome: OutcomeGone}, TargetAnswered{Outcome: OutcomeUnknown},
		RuntimeFailed{Op: OpPrepareCheckpoint}, RuntimeFailed{Op: OpFreeze}, RuntimeFailed{Op: OpFinishCheckpoint}, RuntimeFailed{Op: OpMark},
	)
}

func targetEvents(m *machine) []Event {
	es := append(commonEvents(m),
		Begun{}, ContainersCreated{SandboxID: "sb", Containers: []Container{{"a", "1"}}}, RestorePrepared{Address: "unix:///b"},
		RoundsDone{}, Verified{}, Restored{}, Inspected{Found: FoundNone}, Inspected{Found: FoundAll}, Inspected{Found: FoundMixed},
		RestoredStopped{}, RestoreFinished{}, OutcomeRecorded{},
		RuntimeFailed{Op: OpCreate}, RuntimeFailed{Op: OpPrepareRestore}, RuntimeFailed{Op: OpVerify}, RuntimeFailed{Op: OpRestore},
		RuntimeFailed{Op: OpInspect}, RuntimeFailed{Op: OpStopRestored}, RuntimeFailed{Op: OpFinishRestore}, RuntimeFailed{Op: OpRecordOutcome},
	)
	for _, v := range []Verb{VerbOpen, VerbFreeze, VerbCommit, VerbDone, VerbFailed, VerbAbort} {
		es = append(es, Answered{Verb: v, Verdict: VerdictOK}, Answered{Verb: v, Verdict: VerdictGone}, Answered{Verb: v, Verdict: VerdictNoAnswer})
		for _, c := range []Code{CodeWrongState, CodeAborted, CodeGivenAway, CodeReturned, CodeReleased, CodeNotDurable, CodeIncompatible, "forbidden"} {
			es = append(es, Answered{Verb: v, Verdict: VerdictRefused, Code: c})
		}
	}
	return es
}

func commonEvents(m *machine) []Event {
	return []Event{
		JournalWritten{Seq: m.seq}, JournalFailed{Seq: m.seq}, JournalFailed{Seq: m.seq, Uncertain: true}, JournalDeleted{Seq: m.seq},
		TimerFired{TimerDeadline, m.gens[TimerDeadline]}, TimerFired{TimerRetry, m.gens[TimerRetry]},
		RuntimeRestarted{}, StreamBroken{Message: "cut"}, Cancelled{Message: "deleted"}, PeerFenced{Message: "off"},
	}
}

// stage is a machine in a state, and how it got there.
type stage struct {
	name string
	// from is the stage before; then are the events since.
	from string
	then []func(*machine) Event
	// load, if set, is the record that the machine begins with.
	load *Record
}

func ev(e Event) func(*machine) Event { return func(*machine) Event { return e } }
func written(m *machine) Event        { return JournalWritten{Seq: m.seq} }
func deleted(m *machine) Event        { return JournalDeleted{Seq: m.seq} }
func uncertain(m *machine) Event      { return JournalFailed{Seq: m.seq, Uncertain: true} }
func rec(side Side, st string) *Record {
	return &Record{Version: RecordVersion, Side: side, State: st, Identity: Identity{Session: "s", PeerNode: "n"}, Tell: true}
}

type fs = []func(*machine) Event

var sourceStages = []stage{
	{name: "Fresh"},
	{name: "Open", from: "Fresh", then: fs{ev(OpenRequested{Request: 1})}},
	{name: "Preparing", from: "Open", then: fs{ev(StreamRequested{Request: 2})}},
	{name: "Streaming", from: "Preparing", then: fs{written, ev(CheckpointPrepared{Address: "unix:///a"})}},
	{name: "Freezing", from: "Streaming", then: fs{ev(FreezeRequested{Request: 3})}},
	{name: "Frozen", from: "Freezing", then: fs{ev(StreamSent{}), ev(CheckpointFrozen{})}},
	{name: "Giving", from: "Frozen", then: fs{ev(CommitRequested{Request: 4})}},
	{name: "GivenAway", from: "Giving", then: fs{written}},
	{name: "GivenAway, restarted", load: rec(SideSource, "GivenAway"), then: fs{ev(Restarted{})}},
	{name: "Releasing", from: "GivenAway", then: fs{ev(DoneReported{Request: 5})}},
	{name: "Releasing, durable", from: "Releasing", then: fs{written}},
	{name: "Releasing, stopped and marked", from: "Releasing, durable", then: fs{ev(CheckpointFinished{}), ev(SourceMarked{})}},
	{name: "Returning", from: "GivenAway", then: fs{ev(FailedReported{Request: 6, Reason: ReasonRestoreFailed})}},
	{name: "Returning, durable", from: "Returning", then: fs{written}},
	{name: "Returning, thawed", from: "Returning, durable", then: fs{ev(CheckpointFinished{})}},
	{name: "Aborting", from: "Frozen", then: fs{ev(StreamBroken{Message: "cut"})}},
	{name: "Aborting, record to be taken back", from: "Giving", then: fs{uncertain}},
	{name: "Aborting, thawed", from: "Aborting", then: fs{ev(CheckpointFinished{})}},
	{name: "Released", from: "Releasing, stopped and marked", then: fs{deleted}},
	{name: "Returned", from: "Returning, thawed", then: fs{deleted}},
	{name: "Aborted", from: "Aborting, thawed", then: fs{deleted}},
}

var targetStages = []stage{
	{name: "Fresh"},
	{name: "Opening", from: "Fresh", then: fs{ev(Begun{})}},
	{name: "Preparing", from: "Opening", then: fs{ev(Answered{Verb: VerbOpen, Verdict: VerdictOK})}},
	{name: "Arming", from: "Preparing", then: fs{ev(ContainersCreated{SandboxID: "sb"})}},
	{name: "Receiving", from: "Arming", then: fs{written, ev(RestorePrepared{Address: "unix:///b"})}},
	{name: "FreezeAsked", from: "Receiving", then: fs{ev(RoundsDone{})}},
	{name: "Committing, record not written", from: "FreezeAsked", then: fs{ev(Verified{})}},
	{name: "Committing", from: "Committing, record not written", then: fs{written}},
	{name: "Restoring", from: "Committing", then: fs{ev(Answered{Verb: VerbCommit, Verdict: VerdictOK})}},
	{name: "Running, record not written", from: "Restoring", then: fs{ev(Restored{})}},
	{name: "Running", from: "Running, record not written", then: fs{written}},
	{name: "Running, restarted", load: rec(SideTarget, "Running"), then: fs{ev(Restarted{})}},
	{name: "Running, only to be told", from: "Running", then: fs{ev(OutcomeRecorded{}), ev(RestoreFinished{})}},
	{name: "Running, forgotten", from: "Running, only to be told", then: fs{ev(Answered{Verb: VerbDone, Verdict: VerdictOK})}},
	{name: "Inspecting", load: rec(SideTarget, "Committing"), then: fs{ev(Restarted{})}},
	{name: "Inspecting, cancelled", from: "Inspecting", then: fs{ev(Cancelled{})}},
	{name: "Aborting", from: "FreezeAsked", then: fs{ev(StreamBroken{Message: "cut"})}},
	{name: "Failing", from: "Restoring", then: fs{ev(RuntimeFailed{Op: OpRestore, Message: "no"})}},
	{name: "Failing, durable", from: "Failing", then: fs{written}},
	{name: "Failing, cleared", from: "Failing, durable", then: fs{ev(RestoredStopped{})}},
	{name: "Failing, restarted", load: rec(SideTarget, "Failing"), then: fs{ev(Restarted{})}},
	{name: "Done", from: "Running, forgotten", then: fs{deleted}},
	{name: "Failed", from: "Failing, cleared", then: fs{ev(Answered{Verb: VerbFailed, Verdict: VerdictOK}), ev(OutcomeRecorded{}), ev(RestoreFinished{}), deleted}},
}

// stepper is what the two machines have in common for the table.
type stepper interface {
	Step(Event) ([]Effect, error)
}

// reach makes a machine of a stage.
func reach(t *testing.T, side Side, stages []stage, name string) (stepper, *machine) {
	t.Helper()
	i := slices.IndexFunc(stages, func(s stage) bool { return s.name == name })
	if i < 0 {
		t.Fatalf("no stage %q", name)
	}
	st := stages[i]
	var s stepper
	var m *machine
	switch {
	case st.from != "":
		s, m = reach(t, side, stages, st.from)
	case side == SideSource:
		src := NewSource(Identity{Session: "s", PeerNode: "n"}, Deadlines{})
		if st.load != nil {
			var err error
			if src, err = LoadSource(*st.load, Deadlines{}); err != nil {
				t.Fatal(err)
			}
		}
		s, m = src, &src.machine
	default:
		tgt := NewTarget(Identity{Session: "s", PeerNode: "n"}, Deadlines{})
		if st.load != nil {
			var err error
			if tgt, err = LoadTarget(*st.load, Deadlines{}); err != nil {
				t.Fatal(err)
			}
		}
		s, m = tgt, &tgt.machine
	}
	for _, e := range st.then {
		if _, err := s.Step(e(m)); err != nil {
			t.Fatal(err)
		}
	}
	if got := stateOf(s); got != strings.Split(name, ",")[0] {
		t.Fatalf("stage %q is in state %s", name, got)
	}
	return s, m
}

func stateOf(s stepper) string {
	switch s := s.(type) {
	case *Source:
		return string(s.State())
	case *Target:
		return string(s.State())
	}
	return ""
}

// TestTables walks the product of all states and all events and compares it with the
// tables in testdata, which are there to be read: what is not in a table is ignored
// in that state, on purpose. A pair that no rule covers fails.
func TestTables(t *testing.T) {
	for _, tc := range []struct {
		side   Side
		stages []stage
		events func(*machine) []Event
		states int
	}{
		{SideSource, sourceStages, sourceEvents, len(SourceStates)},
		{SideTarget, targetStages, targetEvents, len(TargetStates)},
	} {
		t.Run(string(tc.side), func(t *testing.T) {
			var b bytes.Buffer
			fmt.Fprintf(&b, "# What a %s does with every event in every state: event, next state, effects.\n"+
				"# An event that is not listed is ignored in that state: it has come too late to matter.\n"+
				"# Written by go test ./kubelet/migration -args -rewrite; read the change before you commit it.\n", tc.side)
			states := map[string]bool{}
			for _, st := range tc.stages {
				fmt.Fprintf(&b, "\n%s\n", st.name)
				_, m := reach(t, tc.side, tc.stages, st.name)
				for i := range tc.events(m) {
					s, m := reach(t, tc.side, tc.stages, st.name)
					before := stateOf(s)
					states[before] = true
					e := tc.events(m)[i]
					effects, err := s.Step(e)
					if err != nil {
						t.Errorf("%s: %v", st.name, err)
						continue
					}
					if next := stateOf(s); next != before || len(effects) > 0 {
						var said []string
						for _, eff := range effects {
							said = append(said, eff.String())
						}
						fmt.Fprintf(&b, "  %-34s → %s: %s\n", e, next, strings.Join(said, "; "))
					}
				}
			}
			if len(states) != tc.states {
				t.Errorf("the table has %d states, there are %d", len(states), tc.states)
			}
			golden(t, filepath.Join("testdata", string(tc.side)+".table"), b.Bytes())
		})
	}
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if rewrite() {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		g, w := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Fatalf("%s, line %d: got\n%s\nwant\n%s", path, i+1, g[i], w[i])
			}
		}
		t.Fatalf("%s: got %d lines, want %d", path, len(g), len(w))
	}
}

// TestEveryEventIsInATable finds the types that are events in the source and looks
// for each in the lists above.
func TestEveryEventIsInATable(t *testing.T) {
	listed := map[string]bool{"Restarted": true} // The first event of a loaded machine, and of no other.
	m := newMachine(SideSource, Identity{}, Deadlines{})
	for _, e := range append(sourceEvents(&m), targetEvents(&m)...) {
		listed[reflect.TypeOf(e).Name()] = true
	}
	f, err := parser.ParseFile(token.NewFileSet(), "event.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Recv == nil || fn.Name.Name != "event" {
			continue
		}
		found++
		if name := fn.Recv.List[0].Type.(*ast.Ident).Name; !listed[name] {
			t.Errorf("event %s is in no table", name)
		}
	}
	if found < 30 {
		t.Errorf("only %d events found", found)
	}
}

// TestRestarted: a loaded machine takes nothing before Restarted, and no other
// machine takes it.
func TestRestarted(t *testing.T) {
	for state := range recordedSource {
		s, err := LoadSource(*rec(SideSource, string(state)), Deadlines{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Step(CommitRequested{Request: 1}); !errors.Is(err, ErrUnlisted) || s.State() != state {
			t.Errorf("source in %s took a request before Restarted: %v", state, err)
		}
		if _, err := s.Step(Restarted{}); err != nil {
			t.Errorf("source in %s: %v", state, err)
		}
		if _, err := s.Step(Restarted{}); !errors.Is(err, ErrUnlisted) {
			t.Errorf("source in %s restarted twice: %v", state, err)
		}
	}
	for state := range recordedTarget {
		s, err := LoadTarget(*rec(SideTarget, string(state)), Deadlines{})
		if err != nil {
			t.Fatal(err)
		}
		if o, _, _ := s.Outcome(); o != OutcomePending {
			t.Errorf("target in %s says %s before Restarted", state, o)
		}
		if _, err := s.Step(Restored{}); !errors.Is(err, ErrUnlisted) {
			t.Errorf("target in %s took an event before Restarted: %v", state, err)
		}
		if _, err := s.Step(Restarted{}); err != nil {
			t.Errorf("target in %s: %v", state, err)
		}
	}
}

func TestRecords(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Record)
	}{
		{"version", func(r *Record) { r.Version = 2 }},
		{"side", func(r *Record) { r.Side = "middle" }},
		{"session", func(r *Record) { r.Identity.Session = "" }},
		{"state", func(r *Record) { r.State = "Frozen" }},
		{"other side", func(r *Record) { *r = *rec(SideTarget, "Running") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := *rec(SideSource, "GivenAway")
			tc.change(&r)
			if _, err := LoadSource(r, Deadlines{}); !errors.Is(err, ErrRecord) {
				t.Errorf("loaded: %v", err)
			}
		})
	}
	if _, err := LoadTarget(*rec(SideSource, "GivenAway"), Deadlines{}); !errors.Is(err, ErrRecord) {
		t.Errorf("a target was loaded from a source's record: %v", err)
	}
}

// TestStaleTimers: a timer that was set again or stopped does nothing when its old
// setting fires.
func TestStaleTimers(t *testing.T) {
	s := NewSource(Identity{Session: "s"}, Deadlines{})
	step := func(e Event) []Effect {
		out, err := s.Step(e)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	step(OpenRequested{Request: 1})
	step(OpenRequested{Request: 2})
	if out := step(TimerFired{TimerDeadline, 1}); out != nil || s.State() != SourceOpen {
		t.Errorf("an old deadline ended the session: %v", out)
	}
	step(TimerFired{TimerDeadline, 2})
	if s.State() != SourceAborted {
		t.Errorf("the deadline did not end the session: %s", s.State())
	}
}
