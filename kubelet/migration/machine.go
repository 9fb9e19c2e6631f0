package migration

import (
	"errors"
	"time"
)

// ErrUnlisted is returned for a pair of state and event that no rule covers; the
// machine has not changed. It means a mistake in the caller.
var ErrUnlisted = errors.New("no rule for this event in this state")

// sayAfter is how many failed attempts are silent before the user hears of them.
const sayAfter = 3

// machine is what the two machines have in common: effects, timers, the journal and
// chores.
type machine struct {
	id   Identity
	dl   Deadlines
	side Side

	// out collects the effects of the running Step.
	out []Effect
	// fresh is true for a machine from a record that has not seen Restarted.
	fresh bool
	// seq is the number of the last journal effect; answers to older ones are stale.
	seq uint64
	// recorded: there may be a record in the journal.
	recorded bool
	// gens counts the settings of each timer; a firing of an older one is stale.
	gens map[Timer]uint64
	// set has the timers that run.
	set map[Timer]bool
	// tries counts attempts since something last worked.
	tries int
	// todo are the chores that have to succeed, flying those that are under way.
	todo, flying chore
}

// chore is a set of things that are tried until they succeed.
type chore uint16

const (
	// choreFinish: tell the source's runtime what becomes of the containers.
	choreFinish chore = 1 << iota
	// choreMark: give the source pod its final status.
	choreMark
	// choreTell: tell the source's kubelet how it ended.
	choreTell
	// choreRecord: write the clone's final condition.
	choreRecord
	// choreRelease: release the target runtime's session.
	choreRelease
	// choreClear: make sure that no restored process exists.
	choreClear
	// choreInspect: find out what became of the clone's containers.
	choreInspect
	// choreWrite: write the record of this state.
	choreWrite
	// choreDelete: delete the record.
	choreDelete

	choreEnd
)

func newMachine(side Side, id Identity, dl Deadlines) machine {
	return machine{side: side, id: id, dl: dl.withDefaults(), gens: map[Timer]uint64{}, set: map[Timer]bool{}}
}

func (m *machine) emit(e ...Effect) { m.out = append(m.out, e...) }

func (m *machine) setTimer(t Timer, after time.Duration) {
	m.gens[t]++
	m.set[t] = true
	m.emit(SetTimer{Timer: t, Gen: m.gens[t], After: after})
}

func (m *machine) stopTimer(t Timer) {
	if m.set[t] {
		delete(m.set, t)
		m.emit(StopTimer{Timer: t})
	}
}

// fired reports whether a timer event is of the setting that runs.
func (m *machine) fired(e TimerFired) bool {
	if !m.set[e.Timer] || m.gens[e.Timer] != e.Gen {
		return false
	}
	delete(m.set, e.Timer)
	return true
}

// later sets the retry timer to the next pause.
func (m *machine) later() {
	pause := m.dl.Retry
	for i := 0; i < m.tries && pause < m.dl.RetryMax; i++ {
		pause *= 2
	}
	m.tries++
	m.setTimer(TimerRetry, min(pause, m.dl.RetryMax))
}

func (m *machine) write(state string, durable bool, reason Reason, message string, tell bool) {
	m.seq++
	m.recorded = true
	m.emit(WriteJournal{Seq: m.seq, Durable: durable, Record: Record{
		Version: RecordVersion, Side: m.side, Identity: m.id, State: state,
		Reason: reason, Message: message, Tell: tell,
	}})
}

// start adds chores; perform carries one out.
func (m *machine) start(c chore, perform func(chore)) {
	m.todo |= c
	m.flying |= c
	each(c, perform)
}

// done takes chores off the list; it reports whether they were on it.
func (m *machine) done(c chore) bool {
	was := m.todo&c != 0
	m.todo &^= c
	m.flying &^= c
	return was
}

// failed notes that a chore did not work and tries again later. It reports whether
// the chore was on the list and whether the user should hear of it now.
func (m *machine) failed(c chore) (listed, say bool) {
	if m.flying&c == 0 {
		return false, false
	}
	m.flying &^= c
	if !m.set[TimerRetry] {
		m.later()
		say = m.tries == sayAfter
	}
	return true, say
}

// again carries out every chore that failed.
func (m *machine) again(perform func(chore)) {
	c := m.todo &^ m.flying
	m.flying |= c
	each(c, perform)
}

// dropChores forgets all chores: the machine goes where they do not matter.
func (m *machine) dropChores() { m.todo, m.flying, m.tries = 0, 0, 0 }

func each(c chore, f func(chore)) {
	for b := chore(1); b < choreEnd; b <<= 1 {
		if c&b != 0 {
			f(b)
		}
	}
}

func (m *machine) deleteRecord() {
	m.seq++
	m.emit(DeleteJournal{Seq: m.seq})
}

// Identity says which migration this is.
func (m *machine) Identity() Identity { return m.id }
