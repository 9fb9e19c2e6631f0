package agent

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
	// ordered is what inOrder has to run; the first one is running.
	ordered []func(context.Context)
	// calls are the running calls to the runtime that its Finish does not interrupt.
	calls map[chan struct{}]struct{}
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
		calls:  make(map[chan struct{}]struct{}),
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

// once are the calls to the runtime that are not made again when they fail.
var once = []migration.Op{migration.OpPrepareCheckpoint, migration.OpFreeze, migration.OpPrepareRestore, migration.OpVerify}

// fail tells the machine that a step did not work. A runtime that goes away in the
// middle of a call has not failed at it, and what it was at is lost.
func (d *driver) fail(op migration.Op, err error) {
	d.log.Error(err, "Migration step did not work", "operation", op)
	if slices.Contains(once, op) && status.Code(err) == codes.Unavailable {
		d.post(migration.RuntimeRestarted{Message: message(err)})
		return
	}
	d.post(migration.RuntimeFailed{Op: op, Message: message(err)})
}

// identity may be called from anywhere.
func (d *driver) identity() migration.Identity {
	d.step.Lock()
	defer d.step.Unlock()
	return d.m.Identity()
}

func (d *driver) next() (migration.Event, bool) {
	for {
		// What fails because the kubelet shuts down is no failure of the migration: no
		// event after the end of the context counts.
		if d.ctx.Err() != nil {
			return nil, false
		}
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
			if d.ctx.Err() != nil {
				return
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

// inOrder runs f beside the loop, after everything that was given to inOrder before.
func (d *driver) inOrder(f func(ctx context.Context)) {
	d.mu.Lock()
	d.ordered = append(d.ordered, f)
	first := len(d.ordered) == 1
	d.mu.Unlock()
	if !first {
		return
	}
	d.start(func(ctx context.Context) {
		for {
			d.mu.Lock()
			if len(d.ordered) == 0 {
				d.mu.Unlock()
				return
			}
			next := d.ordered[0]
			d.mu.Unlock()
			next(ctx)
			d.mu.Lock()
			d.ordered = d.ordered[1:]
			d.mu.Unlock()
		}
	})
}

// callRuntime runs f beside the loop as a call to the runtime. A call that lasts
// is one that the Finish call of its session interrupts in the runtime.
func (d *driver) callRuntime(lasts bool, f func(ctx context.Context)) {
	done := make(chan struct{})
	if !lasts {
		d.mu.Lock()
		d.calls[done] = struct{}{}
		d.mu.Unlock()
	}
	d.start(func(ctx context.Context) {
		defer func() {
			d.mu.Lock()
			delete(d.calls, done)
			d.mu.Unlock()
			close(done)
		}()
		f(ctx)
	})
}

// finishRuntime runs f when the calls to the runtime that came before it have
// returned. They are not cancelled: a cancelled call returns here while the runtime
// may still be at it, and what f says has to be the last word.
func (d *driver) finishRuntime(f func(ctx context.Context)) {
	d.mu.Lock()
	running := slices.Collect(maps.Keys(d.calls))
	d.mu.Unlock()
	d.callRuntime(false, func(ctx context.Context) {
		for _, done := range running {
			select {
			case <-done:
			case <-ctx.Done():
				return
			}
		}
		f(ctx)
	})
}
