// Package migrationtest puts a source and a target machine into a small model of the
// world: a pod, two kubelets that crash, two runtimes that fail, journals that lose
// writes, a network that loses, delays and repeats messages, and an API server.
//
// Whatever order things happen in, the world checks after every step that at most
// one copy of the pod runs, and at the end that exactly one does, that both sides
// know it, and that nothing is left behind. It shows that the rules are safe and
// live under the duties that package migration states; it does not show that the
// kubelet keeps those duties.
package migrationtest

import (
	"fmt"
	"slices"
	"time"

	"podmig.dev/podmig/kubelet/migration"
)

// Procs is what the processes of a copy of the pod do.
type Procs string

const (
	Absent  Procs = "absent"
	Running Procs = "running"
	Frozen  Procs = "frozen"
	Dead    Procs = "dead"
	// Partial: some containers of the clone run.
	Partial Procs = "partial"
)

// Kind says what an action is.
type Kind int

const (
	// Normal actions are what happens when nothing goes wrong.
	Normal Kind = iota
	// Time is a timer that fires.
	Time
	// Fault is something that goes wrong.
	Fault
	// User is something that somebody wants.
	User
)

// Action is one thing that can happen next.
type Action struct {
	Name string
	Kind Kind
	do   func()
	// due is when it happens by itself, for timers.
	due time.Duration
}

// World is the model. Its zero value is not usable; see New.
type World struct {
	S *host // the source's node
	T *host // the target's node

	// Source and Clone are the two copies of the pod.
	Source, Clone Procs
	// Marked: the API server has the source's final status.
	Marked bool
	// Recorded is the final condition of the clone: "", "True" or "False".
	Recorded string
	// Guarded and Suspended are in force on the source's kubelet.
	Guarded, Suspended bool
	// SourceDeleted, CloneDeleted: somebody deleted the pod.
	SourceDeleted, CloneDeleted bool

	stream    streamState
	cloneRan  bool
	sessions  map[string]bool // sessions of the two runtimes, by side
	net       []*message
	requests  map[migration.RequestID]*message
	nextReq   migration.RequestID
	log       func(string)
	now       time.Duration
	violation error
}

type streamState int

const (
	noStream streamState = iota
	flowing
	complete
	broken
)

// host is a kubelet with its runtime and journal.
type host struct {
	w    *World
	side migration.Side
	up   bool
	// gone: the node is off for good; fenced: this kubelet knows that of its peer.
	gone, fenced bool
	// wiped: the node has lost its disk and what ran on it.
	wiped bool

	source *migration.Source
	target *migration.Target
	record *migration.Record

	journal, runtime, api []task
	results               []migration.Event
	timers                map[migration.Timer]alarm
}

// alarm is a timer that runs.
type alarm struct {
	gen uint64
	due time.Duration
}

// task is something a host has been told to do.
type task struct {
	name string
	// do carries it out; the result says what the machine hears.
	do func() migration.Event
	// fail lists what can go wrong instead.
	fail []fault
}

type fault struct {
	name string
	do   func() migration.Event
}

// message is a request on the network, or its answer.
type message struct {
	name     string
	verb     migration.Verb // empty for AskTarget
	reason   migration.Reason
	text     string
	answered bool
	// verdict and code are the answer's.
	verdict migration.Verdict
	code    migration.Code
	outcome migration.TargetAnswered
	asked   bool // the request was delivered
	id      migration.RequestID
	closed  bool // the asker does not wait any more
}

// New returns a world in which a pod runs and a clone was bound to the other node.
// log may be nil.
func New(log func(string)) *World {
	w := &World{Source: Running, Clone: Absent, log: log,
		sessions: map[string]bool{}, requests: map[migration.RequestID]*message{}}
	w.S = &host{w: w, side: migration.SideSource, up: true, timers: map[migration.Timer]alarm{}}
	w.T = &host{w: w, side: migration.SideTarget, up: true, timers: map[migration.Timer]alarm{}}
	w.T.begin()
	return w
}

func identity(side migration.Side) migration.Identity {
	id := migration.Identity{Session: "c10e0000-1111", Namespace: "default", SourcePod: "redis", SourceUID: "50c00000-2222", ClonePod: "redis-clone"}
	if side == migration.SideSource {
		id.PeerNode, id.SandboxID, id.Containers = "n2", "sb1", []migration.Container{{Name: "redis", ID: "c1"}}
	} else {
		id.PeerNode = "n1"
	}
	return id
}

// begin is what the target's kubelet does with a clone that it knows nothing about.
func (h *host) begin() {
	h.target = migration.NewTarget(identity(h.side), migration.Deadlines{})
	h.step(migration.Begun{})
}

// state is the state of the machine, or why there is none.
func (h *host) state() string {
	switch {
	case !h.up:
		return ifElse(h.gone, "off", "down")
	case h.source != nil:
		return string(h.source.State())
	case h.target != nil:
		return string(h.target.State())
	}
	return "none"
}

// step gives one event to the machine and queues its effects.
func (h *host) step(e migration.Event) {
	before := h.state()
	var effects []migration.Effect
	var err error
	switch {
	case h.source != nil:
		effects, err = h.source.Step(e)
	case h.target != nil:
		effects, err = h.target.Step(e)
	default:
		return
	}
	if err != nil {
		h.w.violate("%s: %v", h.side, err)
		return
	}
	if h.w.log != nil {
		h.w.log(fmt.Sprintf("%s: %s ── %s ──▶ %s", h.side, before, e, h.state()))
	}
	for _, eff := range effects {
		if h.w.log != nil {
			h.w.log("    " + eff.String())
		}
		h.carryOut(eff)
	}
	if h.source != nil && h.source.Terminal() {
		h.source = nil
	}
	if h.target != nil && h.target.Terminal() {
		h.target = nil
	}
	if h.source == nil && h.target == nil && len(h.timers) > 0 {
		h.w.violate("%s ended with a timer running", h.side)
	}
}

func (w *World) say(s string) {
	if w.log != nil {
		w.log(s)
	}
}

func (w *World) violate(format string, args ...any) {
	if w.violation == nil {
		w.violation = fmt.Errorf(format, args...)
		w.say("VIOLATION: " + w.violation.Error())
	}
}

// Check returns the first violation so far.
func (w *World) Check() error {
	if w.Source == Running && (w.Clone == Running || w.Clone == Partial) {
		w.violate("two copies of the pod run")
	}
	if w.S.up && w.Source == Frozen && !w.Guarded {
		w.violate("the source is frozen and not guarded")
	}
	if w.Guarded != w.Suspended {
		w.violate("guard and probes disagree")
	}
	if w.S.source != nil && w.T.target != nil && w.S.source.State() != migration.SourceReturning &&
		w.S.source.Owns() && w.T.target.Owns() {
		w.violate("both sides believe they own the pod: source %s, target %s", w.S.state(), w.T.state())
	}
	return w.violation
}

// CheckEnd returns what is wrong with a world in which nothing happens any more.
func (w *World) CheckEnd() error {
	if err := w.Check(); err != nil {
		return err
	}
	if w.S.gone || w.T.gone {
		return w.checkHalf()
	}
	switch {
	case w.S.state() != "none" || w.T.state() != "none":
		return fmt.Errorf("not ended: source %s, target %s", w.S.state(), w.T.state())
	case w.S.record != nil || w.T.record != nil:
		return fmt.Errorf("a record is left behind")
	case len(w.sessions) > 0:
		return fmt.Errorf("a runtime session is left behind: %v", w.sessions)
	case w.Guarded || w.Suspended:
		return fmt.Errorf("the source is still guarded or its probes suspended")
	case w.T.wiped && w.Marked && w.cloneRan:
		// The clone was the pod, and was lost with its node like any other pod.
		return nil
	case w.Recorded == "True" && (w.Clone != Running || w.Source != Dead || !w.Marked):
		return fmt.Errorf("cloned, but source %s (marked %t), clone %s", w.Source, w.Marked, w.Clone)
	case w.Recorded == "False" && (w.Source != Running || w.Clone == Running || w.Clone == Partial || w.Marked):
		return fmt.Errorf("not cloned, but source %s (marked %t), clone %s", w.Source, w.Marked, w.Clone)
	case w.Recorded == "":
		return fmt.Errorf("the clone has no final condition")
	}
	return nil
}

// checkHalf is CheckEnd when one node is gone.
func (w *World) checkHalf() error {
	switch {
	case w.S.gone && w.T.gone:
		return nil
	case w.T.gone && (w.S.state() != "none" || w.S.record != nil || w.sessions["source"] || w.Guarded):
		return fmt.Errorf("the target's node is off and the source has not ended: %s", w.Summary())
	case w.T.gone && w.Source != Running && !(w.Marked && w.cloneRan):
		return fmt.Errorf("the target's node is off and the pod is lost: %s", w.Summary())
	case w.S.gone && (w.T.state() != "none" || w.T.record != nil || w.sessions["target"] || w.Recorded == ""):
		return fmt.Errorf("the source's node is off and the target has not ended: %s", w.Summary())
	case w.S.gone && (w.Recorded == "True") != (w.Clone == Running):
		return fmt.Errorf("the clone is not what its condition says: %s", w.Summary())
	}
	return nil
}

// Summary is one line about the world.
func (w *World) Summary() string {
	s := fmt.Sprintf("source %s, its pod %s", w.S.state(), w.Source)
	if w.Marked {
		s += " (Migrated)"
	}
	s += fmt.Sprintf("; target %s, its pod %s", w.T.state(), w.Clone)
	if w.Recorded != "" {
		s += " (Cloned=" + w.Recorded + ")"
	}
	return s
}

// Do carries out an action.
func (w *World) Do(a Action) {
	w.now = max(w.now, a.due)
	if a.Kind != Normal {
		w.say("* " + a.Name)
	}
	a.do()
	w.settle()
}

// settle drops messages that nobody waits for and whose request was delivered.
func (w *World) settle() {
	w.net = slices.DeleteFunc(w.net, func(m *message) bool { return m.closed && m.asked })
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
