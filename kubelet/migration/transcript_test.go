package migration_test

import (
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"podmig.dev/podmig/kubelet/migration/migrationtest"
)

// play performs the transcripts in testdata. Its commands are
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
type play struct {
	w   *migrationtest.World
	out []string
}

// handle performs one command.
func (p *play) handle(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	p.out = nil
	if d.Cmd == "new" {
		p.w = migrationtest.New(func(s string) { p.out = append(p.out, s) })
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
			if a.Kind != migrationtest.Normal {
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

func (p *play) say(s string) { p.out = append(p.out, s) }

func (p *play) run(t *testing.T, d *datadriven.TestData) {
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
		if n == 3000 {
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

func (p *play) do(t *testing.T, d *datadriven.TestData, name string) {
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

// TestTranscripts runs the stories in testdata. They are the specification to read
// first; "-args -rewrite" writes them anew, and the change is to be read then, too.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, new(play).handle)
	})
}
