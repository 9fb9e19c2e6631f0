package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/compare"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
)

// connection returns the connection to the source's kubelet.
func (t *target) connection(ctx context.Context) (Peer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.source == nil {
		p, err := t.a.peer(ctx, t.d.identity())
		if err != nil {
			return nil, err
		}
		t.source = p
	}
	return t.source, nil
}

// callTimeout bounds every request but the stream.
const callTimeout = 2 * time.Minute

// call sends one request to the source and tells the engine what became of it.
func (t *target) call(ctx context.Context, e migration.Call) {
	// The engine has its own, shorter deadlines and asks again; this one keeps a
	// connection that went silent from staying for ever.
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := t.request(ctx, e)
	if err != nil && peer.VerdictOf(err) == peer.VerdictNoAnswer {
		id := t.d.identity()
		if off, fenceErr := t.a.cfg.API.Fenced(ctx, id.PeerNode); fenceErr == nil && off {
			t.d.post(migration.PeerFenced{Message: fmt.Sprintf("node %s is marked as out of service", id.PeerNode)})
		}
	}
	answered := migration.Answered{Verb: e.Verb, Verdict: migration.Verdict(peer.VerdictOf(err))}
	if err != nil {
		answered.Code, answered.Message = migration.Code(wire.CodeOf(err)), message(err)
		t.d.log.Info("Source did not say yes", "request", e.Verb, "verdict", answered.Verdict, "err", err)
	}
	t.d.post(answered)
	if e.Verb == migration.VerbFreeze {
		// Only now: what waits for this has to come after the answer.
		t.mu.Lock()
		if t.freezing != nil {
			close(t.freezing)
			t.freezing = nil
		}
		t.mu.Unlock()
	}
}

func (t *target) request(ctx context.Context, e migration.Call) error {
	p, err := t.connection(ctx)
	if err != nil {
		return err
	}
	id := t.d.identity()
	w := session(id)
	t.mu.Lock()
	digest, resumed := t.digest, t.resumed
	t.mu.Unlock()
	failure := &wire.FailureRequest{Reason: string(e.Reason), Message: e.Message}
	switch e.Verb {
	case migration.VerbOpen:
		return t.open(ctx, p, w, id)
	case migration.VerbStream:
		r, err := p.Stream(ctx, w)
		if err == nil {
			t.mu.Lock()
			t.received = r
			t.mu.Unlock()
		}
		return err
	case migration.VerbFreeze:
		t.begin("final", "frozen")
		freezing := make(chan struct{})
		t.mu.Lock()
		t.freezing = freezing
		t.mu.Unlock()
		_, err := p.Freeze(ctx, w, &wire.FreezeRequest{})
		return err
	case migration.VerbCommit:
		t.begin("commit")
		_, err := p.Commit(ctx, w, &wire.CommitRequest{ManifestDigest: digest})
		if err == nil {
			t.end("commit")
		}
		return err
	case migration.VerbDone:
		return p.Done(ctx, w, &wire.DoneRequest{ResumedAt: resumed})
	case migration.VerbFailed:
		return p.Failed(ctx, w, failure)
	case migration.VerbAbort:
		return p.Abort(ctx, w, failure)
	}
	return fmt.Errorf("no such request: %s", e.Verb)
}

func (t *target) open(ctx context.Context, p Peer, w wire.Session, id migration.Identity) error {
	pod, ok := t.a.cfg.Node.Pod(id.Session)
	if !ok {
		return wire.Errorf(wire.CodeAborted, "the clone is not on this node any more")
	}
	features, err := t.a.wireFeatures(ctx)
	if err != nil {
		var own *wire.Error
		if errors.As(err, &own) && own.Code == wire.CodeNoRuntime {
			// It is not the source that lacks it.
			own.Code = wire.CodeIncompatible
		}
		return err
	}
	r := &wire.OpenRequest{
		Clone: id.ClonePod, SourceUID: id.SourceUID, TargetNode: t.a.cfg.Node.Name(), Features: features,
		Volumes: wireVolumes(pod), MemoryAvailable: t.a.cfg.Node.MemoryAvailable(),
	}
	for _, c := range compare.Moving(&pod.Spec) {
		tc := wire.TargetContainer{Name: c.Name, Image: c.Image, Sidecar: c.RestartPolicy != nil}
		for _, m := range c.VolumeMounts {
			tc.Mounts = append(tc.Mounts, m.MountPath)
		}
		slices.Sort(tc.Mounts)
		r.Containers = append(r.Containers, tc)
	}
	offer, err := p.Open(ctx, w, r)
	if err != nil {
		return err
	}
	for _, f := range offer.Findings {
		t.a.cfg.Node.Event(ctx, pod, true, f.Code, wire.Sentence(f.Message, f.Cure))
	}
	t.mu.Lock()
	t.offer = offer
	t.mu.Unlock()
	return nil
}

// receive copies the stream of the source to the runtime.
func (t *target) receive(ctx context.Context, address string) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t.mu.Lock()
	t.cut = cancel
	t.mu.Unlock()
	n, err := t.copyStream(ctx, address)
	t.a.cfg.Metrics.received(uint64(n))
	if err == nil {
		return
	}
	// A dump that fails breaks the stream, too. The answer to the freeze says why, and
	// it is on its way.
	t.mu.Lock()
	freezing := t.freezing
	t.mu.Unlock()
	if freezing != nil {
		select {
		case <-freezing:
		case <-ctx.Done():
		case <-time.After(whyTimeout):
		}
	}
	t.d.post(migration.StreamBroken{Message: err.Error()})
}

// whyTimeout is how long a broken stream waits for its reason.
const whyTimeout = 2 * time.Second

func (t *target) copyStream(ctx context.Context, address string) (int64, error) {
	t.mu.Lock()
	in := t.received
	t.received = nil
	t.mu.Unlock()
	if in == nil {
		p, err := t.connection(ctx)
		if err != nil {
			return 0, err
		}
		if in, err = p.Stream(ctx, session(t.d.identity())); err != nil {
			return 0, err
		}
	}
	defer in.Close()
	out, err := t.a.cfg.DialStream(ctx, address)
	if err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { out.Close(); in.Close() })
	defer stop()
	// The runtime writes when the rounds before the freeze are over. A connection that
	// ends without it is one of a stream that breaks.
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		if readSigns(out, func(d time.Duration) {
			t.expected.Store(int64(d))
			t.writeTransfer()
		}) == nil {
			t.d.post(migration.RoundsDone{})
		}
		_, _ = io.Copy(io.Discard, out)
	}()
	defer func() {
		out.Close()
		<-closed
	}()
	telling, told := context.WithCancel(ctx)
	var teller sync.WaitGroup
	teller.Go(func() { t.tellTransfer(telling) })
	defer func() { told(); teller.Wait() }()
	n, err := io.CopyBuffer(onlyWriter{out}, counting{in, &t.bytes}, make([]byte, 1<<20))
	if err != nil {
		return n, fmt.Errorf("after %d bytes of the checkpoint: %w", n, err)
	}
	if err := out.CloseWrite(); err != nil {
		return n, err
	}
	<-closed
	return n, nil
}

// readSigns reads what the runtime writes back until it says that the rounds are over.
func readSigns(r io.Reader, expected func(time.Duration)) error {
	sign := make([]byte, 9)
	for {
		if _, err := io.ReadFull(r, sign[:1]); err != nil {
			return err
		}
		switch sign[0] {
		case cri.StreamReady:
			return nil
		case cri.StreamExpected:
			if _, err := io.ReadFull(r, sign[1:]); err != nil {
				return err
			}
			expected(time.Duration(binary.BigEndian.Uint64(sign[1:])))
		default:
			return fmt.Errorf("the runtime writes the unknown sign %q", sign[0])
		}
	}
}

// onlyWriter and counting keep io.Copy to the buffer it is given.
type onlyWriter struct{ io.Writer }

// counting counts what is read.
type counting struct {
	r     io.Reader
	bytes *atomic.Int64
}

func (c counting) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.bytes.Add(int64(n))
	return n, err
}
