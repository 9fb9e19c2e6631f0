package migrationtest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

// Play performs the transcripts in testdata. Its commands are
//
//	new
//	  begins a new world: a pod runs, a clone is bound to the other node.
//	run [until=(source Frozen)] [quiet]
//	  lets things take their course until a side is in a state ("down" and "none" are
//	  states, too), or until nothing happens any more. Timers pass only when nothing
//	  else can happen. quiet leaves out what happened.
//	do
//	  carries out the actions named in the input, one a line.
//	can
//	  lists what else can happen now: faults, timers, wishes.
//	owners
//	  says which side has the right to run the pod.
//	world
//	  sums up.
//
// A violation of an invariant is a part of the output, which no transcript contains.
type Play struct {
	w   *World
	out []string
}

// NewPlay returns an empty stage.
func NewPlay() *Play { return &Play{} }

// Handle performs one command.
func (p *Play) Handle(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	p.out = nil
	if d.Cmd == "new" {
		p.w = New(func(s string) { p.out = append(p.out, s) })
		return "" // The beginning is the same in every story.
	}
	if p.w == nil {
		d.Fatalf(t, "%s before new", d.Cmd)
	}
	switch d.Cmd {
	case "run":
		p.run(t, d)
	case "do":
		for _, name := range strings.Split(strings.TrimSpace(d.Input), "\n") {
			p.do(t, d, name)
		}
	case "can":
		for _, a := range p.w.Actions() {
			if a.Kind != Normal {
				p.say(a.Name)
			}
		}
	case "owners":
		p.say(p.w.Owners())
	case "world":
		p.say(p.w.Summary())
	default:
		d.Fatalf(t, "unknown command %s", d.Cmd)
	}
	return strings.Join(p.out, "\n") + "\n"
}

func (p *Play) say(s string) { p.out = append(p.out, s) }

func (p *Play) run(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	var side, state string
	if d.HasArg("until") {
		var until string
		d.ScanArgs(t, "until", &until)
		var ok bool
		if side, state, ok = strings.Cut(until, " "); !ok {
			d.Fatalf(t, "until wants a side and a state, got %q", until)
		}
	}
	for n := 0; side == "" || p.w.State(side) != state; n++ {
		if n == maxQuiet {
			d.Fatalf(t, "turns in circles: %s", p.w.Summary())
		}
		if !p.w.Next() {
			if side != "" {
				d.Fatalf(t, "the %s never got to %s: %s", side, state, p.w.Summary())
			}
			if err := p.w.CheckEnd(); err != nil {
				p.say("END: " + err.Error())
			}
			break
		}
	}
	if err := p.w.Check(); err != nil {
		p.say("VIOLATION: " + err.Error())
	}
	if d.HasArg("quiet") {
		p.out = nil
	}
	if side == "" || d.HasArg("quiet") {
		p.say(p.w.Summary())
	}
}

func (p *Play) do(t *testing.T, d *datadriven.TestData, name string) {
	t.Helper()
	for _, a := range p.w.Actions() {
		if a.Name == name {
			p.w.Do(a)
			return
		}
	}
	var can []string
	for _, a := range p.w.Actions() {
		can = append(can, a.Name)
	}
	d.Fatalf(t, "%q cannot happen now; what can:\n%s", name, strings.Join(can, "\n"))
}

// State is the state of a side: "source" or "target".
func (w *World) State(side string) string {
	if side == string(w.S.side) {
		return w.S.state()
	}
	return w.T.state()
}

// Owners says which side has the right to run the pod, as far as the machines know.
func (w *World) Owners() string {
	says := func(up, has, owns bool) string {
		switch {
		case !up:
			return "is down"
		case !has:
			return "has no session"
		}
		return ifElse(owns, "owns the pod", "does not own the pod")
	}
	return fmt.Sprintf("the source %s, the target %s",
		says(w.S.up, w.S.source != nil, w.S.source != nil && w.S.source.Owns()),
		says(w.T.up, w.T.target != nil, w.T.target != nil && w.T.target.Owns()))
}
