package agent

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"
	"unicode"

	"k8s.io/klog/v2"

	"podmig.dev/podmig/kubelet/journal"
	"podmig.dev/podmig/kubelet/migration"
)

// machine is what Source and Target of the engine have in common.
type machine interface {
	Step(migration.Event) ([]migration.Effect, error)
	Terminal() bool
	Identity() migration.Identity
}

// driver runs one machine. Its loop is the only caller of Step.
type driver struct {
	side    migration.Side
	m       machine
	journal Journal
	log     klog.Logger
	// perform carries out the effects that the driver does not know itself. It is
	// called by the loop and must not block.
	perform func(migration.Effect)
	// point is Config.Point.
	point func(string)

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// done is closed when the machine is terminal and every goroutine has returned.
	done chan struct{}

	// step guards the machine: the loop steps it, others look at it.
	step sync.Mutex

	mu     sync.Mutex
	queue  []migration.Event
	wake   chan struct{}
	timers map[migration.Timer]*time.Timer
	// calls are the running calls to the runtime.
	calls map[*call]struct{}
}

// call is one call to the runtime that can be cancelled and waited for.
type call struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func newDriver(ctx context.Context, side migration.Side, m machine, j Journal) *driver {
	id := m.Identity()
	log := klog.FromContext(ctx).WithValues("side", side, "session", id.Session,
		"source", klog.KRef(id.Namespace, id.SourcePod), "clone", klog.KRef(id.Namespace, id.ClonePod), "peer", id.PeerNode)
	ctx, cancel := context.WithCancel(klog.NewContext(ctx, log))
	return &driver{
		side: side, m: m, journal: j, log: log, ctx: ctx, cancel: cancel,
		done:   make(chan struct{}),
		wake:   make(chan struct{}, 1),
		timers: make(map[migration.Timer]*time.Timer),
		calls:  make(map[*call]struct{}),
	}
}

// post hands an event to the machine. It never blocks; events after the end are
// dropped.
func (d *driver) post(e migration.Event) {
	d.mu.Lock()
	d.queue = append(d.queue, e)
	d.mu.Unlock()
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// identity may be called from anywhere.
func (d *driver) identity() migration.Identity {
	d.step.Lock()
	defer d.step.Unlock()
	return d.m.Identity()
}

func (d *driver) next() (migration.Event, bool) {
	for {
		d.mu.Lock()
		if len(d.queue) > 0 {
			e := d.queue[0]
			d.queue = d.queue[1:]
			d.mu.Unlock()
			return e, true
		}
		d.mu.Unlock()
		select {
		case <-d.wake:
		case <-d.ctx.Done():
			return nil, false
		}
	}
}

// run is the loop. It returns when the machine is terminal or the agent closes; a
// machine that is not terminal then goes on from its record after a restart.
func (d *driver) run() {
	defer func() {
		d.cancel()
		d.mu.Lock()
		for _, t := range d.timers {
			t.Stop()
		}
		d.mu.Unlock()
		d.wg.Wait()
		close(d.done)
	}()
	for {
		e, ok := d.next()
		if !ok {
			return
		}
		d.step.Lock()
		effects, err := d.m.Step(e)
		terminal := d.m.Terminal()
		d.step.Unlock()
		if err != nil {
			// A rule is missing: the machine did not move, its timers end it.
			d.log.Error(err, "Migration engine has no rule for the event", "event", e)
			continue
		}
		d.log.V(4).Info("Migration step", "event", e, "effects", effects)
		for _, effect := range effects {
			if d.point != nil {
				d.point(pointName(d.side, effect))
			}
			d.do(effect)
		}
		if terminal {
			return
		}
	}
}

// pointName makes a file name of an effect's words.
func pointName(side migration.Side, e migration.Effect) string {
	words := strings.FieldsFunc(strings.ToLower(e.String()), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
	return string(side) + "." + strings.Join(words, "-")
}

func (d *driver) do(effect migration.Effect) {
	switch e := effect.(type) {
	case migration.WriteJournal:
		if err := d.journal.Put(e.Record); err != nil {
			d.journalFailed(e.Seq, err)
			return
		}
		d.post(migration.JournalWritten{Seq: e.Seq})
	case migration.DeleteJournal:
		if err := d.journal.Delete(d.side, d.identity().Session); err != nil {
			d.journalFailed(e.Seq, err)
			return
		}
		d.post(migration.JournalDeleted{Seq: e.Seq})
	case migration.SetTimer:
		d.setTimer(e)
	case migration.StopTimer:
		d.mu.Lock()
		defer d.mu.Unlock()
		if t := d.timers[e.Timer]; t != nil {
			t.Stop()
		}
	default:
		d.perform(effect)
	}
}

func (d *driver) journalFailed(seq uint64, err error) {
	d.log.Error(err, "Migration journal cannot be written")
	d.post(migration.JournalFailed{Seq: seq, Uncertain: errors.Is(err, journal.ErrUncertain), Message: err.Error()})
}

func (d *driver) setTimer(e migration.SetTimer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.timers[e.Timer]; t != nil {
		t.Stop()
	}
	d.timers[e.Timer] = time.AfterFunc(e.After, func() {
		d.post(migration.TimerFired{Timer: e.Timer, Gen: e.Gen})
	})
}

// start runs f beside the loop.
func (d *driver) start(f func(ctx context.Context)) {
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		f(d.ctx)
	}()
}

// callRuntime runs f beside the loop as a call that finish cancels.
func (d *driver) callRuntime(f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(d.ctx)
	c := &call{cancel: cancel, done: make(chan struct{})}
	d.mu.Lock()
	d.calls[c] = struct{}{}
	d.mu.Unlock()
	d.start(func(context.Context) {
		defer func() {
			cancel()
			d.mu.Lock()
			delete(d.calls, c)
			d.mu.Unlock()
			close(c.done)
		}()
		f(ctx)
	})
}

// finishRuntime cancels the calls to the runtime that are still running, waits for
// them and then runs f: what f says to the runtime is the last word.
func (d *driver) finishRuntime(f func(ctx context.Context)) {
	d.mu.Lock()
	running := make([]*call, 0, len(d.calls))
	for c := range d.calls {
		running = append(running, c)
	}
	d.mu.Unlock()
	d.callRuntime(func(ctx context.Context) {
		for _, c := range running {
			c.cancel()
		}
		for _, c := range running {
			<-c.done
		}
		f(ctx)
	})
}
