package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/checkpoint/tree"
	"podmig.dev/podmig/containerd-cri/runtime"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// A checkpoint session moves through
//
//	prepared -> freezing -> sent
//	                     -> failed
//
// and ends with its Finish call in any of them. From freezing on the containers
// are frozen. A session taken up after a restart is failed: its stream is gone.
type phase string

const (
	phasePrepared phase = "prepared"
	phaseFreezing phase = "freezing"
	phaseSent     phase = "sent"
	phaseFailed   phase = "failed"
)

// checkpointRecord is the part of a session that outlives the process.
type checkpointRecord struct {
	ID         string
	Request    []byte // the PrepareCheckpointRequest, marshalled deterministically
	Phase      phase
	Containers []runtime.Container
	// Output is the directory that CheckpointPod writes to, empty for a stream.
	Output string
}

type checkpointSession struct {
	checkpointRecord
	dir        string
	address    string
	containers []Container
	volumes    []*migration.Volume
	created    time.Time
	ctx        context.Context
	cancel     context.CancelFunc
	conn       chan struct{} // closed when the reader has connected
	stream     net.Conn
	out        *checkpoint.Writer
	listener   net.Listener
	// Rounds before the freeze: stop ends them, and rounds is closed when they have
	// ended. After that memory and round, the number of the next one, are the freeze's.
	stop   context.CancelFunc
	rounds chan struct{}
	memory []runtime.Memory
	round  uint32
	// late is how long the rest would take if that is more than budget; rounds guards it.
	budget, late time.Duration
	// manifest and its digest are there after the freeze.
	manifest *checkpoint.Manifest
	digest   string
	// abandoned is set when a CheckpointPod has ended and the containers are still frozen.
	abandoned bool

	// op is held by the call that changes the session.
	op sync.Mutex
	mu sync.Mutex // protects Phase, stream, out, abandoned
}

func (c *checkpointSession) containerIDs() []string {
	var ids []string
	for _, x := range c.Containers {
		ids = append(ids, x.ID)
	}
	return ids
}

func (c *checkpointSession) phase() phase {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Phase
}

func (c *checkpointSession) expired(limit time.Duration) bool {
	if c.Output != "" {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.abandoned
	}
	select {
	case <-c.conn:
		return false
	default:
		return c.phase() == phasePrepared && time.Since(c.created) > limit
	}
}

// setPhase records the phase before it becomes true.
func (c *checkpointSession) setPhase(p phase) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.checkpointRecord
	r.Phase = p
	if err := save(c.dir, r); err != nil {
		return err
	}
	c.Phase = p
	return nil
}

// PrepareCheckpoint implements migration.MigrationServiceServer.
func (s *Service) PrepareCheckpoint(ctx context.Context, r *migration.PrepareCheckpointRequest) (*migration.PrepareCheckpointResponse, error) {
	req, err := checkPrepare(r)
	if err != nil {
		return nil, err
	}
	if r.FreezeBudget < 0 {
		return nil, invalid("the freeze budget is %d", r.FreezeBudget)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.checkpoints[r.SessionId]; old != nil {
		if string(old.Request) != string(req) {
			return nil, status.Errorf(codes.AlreadyExists, "session %q was prepared with other arguments", r.SessionId)
		}
		return &migration.PrepareCheckpointResponse{StreamAddress: old.address}, nil
	}
	names := map[string]string{}
	for _, c := range r.Containers {
		names[c.ContainerId] = c.Name
	}
	cs, err := s.containers(ctx, r.PodSandboxId, names, len(r.Containers), StateRunning)
	if err != nil {
		return nil, err
	}
	for _, c := range cs {
		if c.UpperDir == "" {
			return nil, precondition("container %s has no writable layer that can be read: only the overlayfs snapshotter is supported", c.Name)
		}
		if c.TTY {
			return nil, precondition("container %s has a terminal, which can not be moved: run it without tty", c.Name)
		}
	}
	if err := s.busy(cs, podSessions); err != nil {
		return nil, err
	}
	session := &checkpointSession{
		checkpointRecord: checkpointRecord{ID: r.SessionId, Request: req, Phase: phasePrepared},
		dir:              s.sessionDir(sideCheckpoint, r.SessionId),
		containers:       cs,
		volumes:          r.Volumes,
		created:          time.Now(),
		conn:             make(chan struct{}),
		rounds:           make(chan struct{}),
		budget:           time.Duration(r.FreezeBudget),
	}
	for _, c := range cs {
		session.Containers = append(session.Containers, c.Container)
		session.memory = append(session.memory, s.c.Runtime.Track(c.Container))
	}
	session.ctx, session.cancel = context.WithCancel(context.WithoutCancel(ctx))
	ctx, session.stop = context.WithCancel(session.ctx)
	if err := s.openCheckpoint(ctx, session); err != nil {
		session.cancel()
		_ = s.removeDir(session.dir)
		return nil, toStatus(err)
	}
	s.checkpoints[r.SessionId] = session
	log.G(ctx).WithField("session", r.SessionId).Info("checkpoint session prepared")
	return &migration.PrepareCheckpointResponse{StreamAddress: session.address}, nil
}

// openCheckpoint waits for the reader of the stream and sends it the rounds before the
// freeze, until ctx ends.
func (s *Service) openCheckpoint(ctx context.Context, c *checkpointSession) error {
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return err
	}
	if err := s.c.Scratch.Create(filepath.Join(c.dir, scratchDir)); err != nil {
		return err
	}
	if err := save(c.dir, c.checkpointRecord); err != nil {
		return err
	}
	l, address, err := listen(c.dir)
	if err != nil {
		return err
	}
	c.listener, c.address = l, address
	s.background.Add(1)
	go func() {
		defer s.background.Done()
		defer close(c.rounds)
		conn := acceptOne(c.ctx, l)
		if conn == nil {
			return
		}
		out, err := checkpoint.NewWriter(conn, c.ID)
		if err != nil {
			conn.Close()
			log.G(c.ctx).WithError(err).WithField("session", c.ID).Error("reader of the checkpoint stream went away")
			return
		}
		c.mu.Lock()
		c.stream, c.out = conn, out
		c.mu.Unlock()
		close(c.conn)
		// A reader that stalls blocks the write, not the end of the session.
		defer context.AfterFunc(c.ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
		if err := c.sendRounds(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).WithField("session", c.ID).Error("rounds before the freeze have failed")
		}
	}()
	return nil
}

// forget releases what the rounds have remembered; op is held.
func (c *checkpointSession) forget() {
	for _, m := range c.memory {
		m.Close()
	}
	c.memory = nil
}

// Rounds go on while they shrink, up to a number and down to a size that the freeze
// does not notice.
const (
	maxRounds   = 8
	enoughPages = 4 << 20 / checkpoint.PageSize
)

// rest is how long it would take to send what was written in the last round, from what the last
// two took: what a round sends was written during the one before, so much is written per second
// in the last one, too, and it is sent as fast.
func rest(before, took time.Duration) time.Duration {
	return time.Duration(float64(took) * float64(took) / float64(max(before, 1)))
}

// pace decides after each round whether there is another one.
type pace struct {
	// budget is for how long the rest may take in the freeze; 0 for any time.
	budget time.Duration

	rounds int
	pages  uint64
	took   time.Duration
}

// round takes in what the last round was. late is how long the rest would take if that is
// more than the budget and further rounds would not help.
func (p *pace) round(pages uint64, took time.Duration) (ready bool, late time.Duration) {
	before := *p
	p.rounds, p.pages, p.took = p.rounds+1, pages, took
	if pages <= enoughPages {
		return true, 0
	}
	if before.rounds == 0 {
		return false, 0
	}
	left := rest(before.took, took)
	if p.budget > 0 && left <= p.budget {
		return true, 0
	}
	if p.rounds == maxRounds || pages > before.pages*7/10 {
		if p.budget > 0 {
			late = left
		}
		return true, late
	}
	return false, 0
}

// sendRounds sends memory while the containers run, until what is left is little or does
// not shrink any more. A round that is cut short is still one: what it sent counts.
func (c *checkpointSession) sendRounds(ctx context.Context) error {
	pace := pace{budget: c.budget}
	for ready := false; !ready; c.round++ {
		sent := make([]uint64, len(c.memory))
		start := time.Now()
		var g errgroup.Group
		for i, m := range c.memory {
			g.Go(func() (err error) {
				sent[i], err = m.Round(ctx, c.out, c.round)
				return err
			})
		}
		err := g.Wait()
		if ctx.Err() == nil && err != nil {
			log.G(ctx).WithError(err).WithField("session", c.ID).Warn("memory is left to the freeze")
		}
		r := checkpoint.Round{Number: c.round}
		for _, n := range sent {
			r.Pages += n
		}
		ready, c.late = pace.round(r.Pages, time.Since(start))
		ready = ready || err != nil
		r.Ready = ready && ctx.Err() == nil
		if err := c.out.Round(r); err != nil {
			return err
		}
		log.G(ctx).WithField("session", c.ID).WithField("round", r.Number).WithField("pages", r.Pages).
			WithField("duration", time.Since(start)).Debug("round before the freeze sent")
	}
	return nil
}

// FreezeCheckpoint implements migration.MigrationServiceServer.
func (s *Service) FreezeCheckpoint(ctx context.Context, r *migration.FreezeCheckpointRequest) (*migration.FreezeCheckpointResponse, error) {
	s.mu.Lock()
	c := s.checkpoints[r.SessionId]
	s.mu.Unlock()
	if c == nil || c.Output != "" {
		return nil, status.Errorf(codes.NotFound, "no checkpoint session %q", r.SessionId)
	}
	if !c.op.TryLock() {
		return nil, precondition("session %q is busy with another call", r.SessionId)
	}
	defer c.op.Unlock()
	if p := c.phase(); p != phasePrepared {
		return nil, precondition("session %q is %s, only a prepared session can be frozen", r.SessionId, p)
	}
	select {
	case <-c.conn:
	case <-time.After(connectGrace):
		return nil, precondition("nobody reads the stream of session %q: connect to its address first", r.SessionId)
	case <-ctx.Done():
		return nil, toStatus(ctx.Err())
	}
	ctx, cancel := context.WithTimeout(ctx, transferLimit)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	// A reader that stalls blocks the write, not the deadline.
	defer context.AfterFunc(ctx, func() { _ = c.stream.SetDeadline(time.Unix(1, 0)) })()
	c.stop()
	<-c.rounds
	if c.late > 0 {
		return nil, precondition("the pod writes so much that it would stand still for %s until the rest is sent, and it may for %s: move it when it writes less, or give it more time",
			c.late.Round(time.Millisecond), c.budget)
	}

	res, err := s.freeze(ctx, c)
	end := phaseSent
	if err != nil {
		end = phaseFailed
		err = toStatus(fmt.Errorf("session %q: %w", r.SessionId, err))
		if c.ctx.Err() != nil {
			err = status.Errorf(codes.Aborted, "session %q was finished while it froze", r.SessionId)
		}
	}
	_ = c.stream.Close()
	c.forget()
	if serr := c.setPhase(end); err == nil {
		err = toStatus(serr)
	}
	l := log.G(ctx).WithField("session", r.SessionId)
	if err != nil {
		l.WithError(err).Error("checkpoint failed, the containers stay frozen")
		return nil, err
	}
	l.WithField("bytes", res.StreamBytes).WithField("freeze", time.Duration(res.FreezeDuration)).
		WithField("dump", time.Duration(res.DumpDuration)).Info("checkpoint sent")
	return res, nil
}

func (s *Service) freeze(ctx context.Context, c *checkpointSession) (*migration.FreezeCheckpointResponse, error) {
	features, err := s.features()
	if err != nil {
		return nil, err
	}
	before := c.out.Bytes()
	if err := c.setPhase(phaseFreezing); err != nil {
		return nil, err
	}
	start := time.Now()
	fctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	if err := s.c.Runtime.Freeze(fctx, c.Containers); err != nil {
		return nil, err
	}
	frozen := time.Now()

	dumped := make([]runtime.Dumped, len(c.Containers))
	g, gctx := errgroup.WithContext(ctx)
	for i, x := range c.Containers {
		g.Go(func() error {
			dir := filepath.Join(c.dir, scratchDir, fmt.Sprintf("dump%d", i))
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			var err error
			dumped[i], err = s.c.Runtime.Dump(gctx, x, c.memory[i], dir, c.out, c.round)
			return err
		})
	}
	g.Go(func() error { return c.sendFiles(gctx) })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	m := &checkpoint.Manifest{
		FrozenAt: frozen.UnixNano(),
		Source: checkpoint.Node{
			Runtime: s.c.RuntimeName + " " + s.c.RuntimeVersion, OCIRuntime: features.OCIName + " " + features.OCIVersion,
			CRIU: features.CRIUVersion, Kernel: features.KernelRelease, Architecture: features.Architecture,
			CPUFeatures: features.CPUFeatures,
		},
	}
	round := checkpoint.Round{Number: c.round, Final: true}
	var dump time.Duration
	for i, x := range c.containers {
		m.Containers = append(m.Containers, checkpoint.Container{
			Name: x.Name, ImageID: x.ImageID, StartedAt: x.StartedAt.UnixNano(), Args: x.Args, MemoryBytes: dumped[i].MemoryBytes,
		})
		if c.Output != "" {
			m.Containers[i].Process = &x.Process
		}
		round.Pages += dumped[i].Pages
		dump = max(dump, dumped[i].Duration)
	}
	for _, v := range c.volumes {
		m.Volumes = append(m.Volumes, v.Name)
	}
	if err := c.out.Round(round); err != nil {
		return nil, err
	}
	// The logs come last: by now everything printed before the freeze has passed
	// the pipes and is in the files.
	if err := c.sendLogs(ctx); err != nil {
		return nil, err
	}
	digest, err := c.out.Finish(m)
	if err != nil {
		return nil, err
	}
	c.manifest, c.digest = m, digest
	log.G(ctx).WithField("session", c.ID).WithField("manifest", digest).Info("checkpoint manifest")
	total := c.out.Bytes()
	return &migration.FreezeCheckpointResponse{
		FrozenAt: frozen.UnixNano(), StreamBytes: total, FinalBytes: total - before,
		FreezeDuration: int64(frozen.Sub(start)), DumpDuration: int64(dump),
	}, nil
}

// sendFiles sends writable layers, volumes and /dev/shm, each once.
func (c *checkpointSession) sendFiles(ctx context.Context) error {
	send := func(dir string, part checkpoint.Part) error {
		w, err := c.out.Begin(part)
		if err != nil {
			return err
		}
		if err := tree.Send(ctx, dir, part.Kind, w); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
		return w.Close()
	}
	shm := ""
	for _, x := range c.containers {
		if err := send(x.UpperDir, checkpoint.Part{Kind: checkpoint.KindRootfs, Container: x.Name}); err != nil {
			return err
		}
		shm = x.ShmDir
	}
	for _, v := range c.volumes {
		if err := send(v.HostPath, checkpoint.Part{Kind: checkpoint.KindVolume, Name: v.Name}); err != nil {
			return err
		}
	}
	if shm == "" {
		return nil
	}
	return send(shm, checkpoint.Part{Kind: checkpoint.KindShm})
}

func (c *checkpointSession) sendLogs(ctx context.Context) error {
	buf := make([]byte, 256<<10)
	for _, x := range c.containers {
		if x.LogPath == "" {
			continue
		}
		if err := sendLog(ctx, c.out, x, buf); err != nil {
			return fmt.Errorf("log of container %s: %w", x.Name, err)
		}
	}
	return nil
}

func sendLog(ctx context.Context, out *checkpoint.Writer, x Container, buf []byte) error {
	f, err := openRegular(x.LogPath, os.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	w, err := out.Begin(checkpoint.Part{Kind: checkpoint.KindLog, Container: x.Name})
	if err != nil {
		return err
	}
	var off int64
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if werr := w.Data(off, buf[:n]); werr != nil {
				return werr
			}
			off += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return w.Close()
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
}

// FinishCheckpoint implements migration.MigrationServiceServer.
func (s *Service) FinishCheckpoint(ctx context.Context, r *migration.FinishCheckpointRequest) (*migration.FinishCheckpointResponse, error) {
	if err := checkSession(r.SessionId); err != nil {
		return nil, err
	}
	if r.Outcome != migration.Outcome_OUTCOME_RESUME && r.Outcome != migration.Outcome_OUTCOME_STOP {
		return nil, invalid("an outcome is needed: resume or stop")
	}
	s.mu.Lock()
	c := s.checkpoints[r.SessionId]
	s.mu.Unlock()
	if c == nil {
		var cs []runtime.Container
		for _, id := range r.ContainerIds {
			x, err := s.c.Containers.Get(ctx, id)
			if err != nil || x.State != StateRunning {
				continue
			}
			s.mu.Lock()
			held := s.busy([]Container{x}, podSessions) != nil
			s.mu.Unlock()
			// A CheckpointPod resumes its containers itself, when it has their state.
			if !held || r.Outcome == migration.Outcome_OUTCOME_STOP {
				cs = append(cs, x.Container)
			}
		}
		if err := s.apply(ctx, cs, r.Outcome); err != nil {
			return nil, toStatus(err)
		}
		return &migration.FinishCheckpointResponse{}, nil
	}
	if err := s.endCheckpoint(ctx, c, r.Outcome); err != nil {
		return nil, toStatus(fmt.Errorf("session %q: %w", r.SessionId, err))
	}
	log.G(ctx).WithField("session", r.SessionId).WithField("outcome", r.Outcome).Info("checkpoint session finished")
	return &migration.FinishCheckpointResponse{}, nil
}

func (s *Service) apply(ctx context.Context, cs []runtime.Container, o migration.Outcome) error {
	ctx, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	if o == migration.Outcome_OUTCOME_STOP {
		return s.c.Runtime.Kill(ctx, cs)
	}
	return s.c.Runtime.Thaw(ctx, cs)
}

// endCheckpoint interrupts what the session does, applies the outcome and removes
// the session. After an error the session stays, to be finished again.
func (s *Service) endCheckpoint(ctx context.Context, c *checkpointSession, o migration.Outcome) error {
	c.cancel()
	c.op.Lock()
	defer c.op.Unlock()
	s.mu.Lock()
	known := s.checkpoints[c.ID] == c
	s.mu.Unlock()
	if !known {
		return nil // Another call has ended it meanwhile.
	}
	<-c.rounds
	c.forget()
	if err := s.apply(ctx, c.Containers, o); err != nil {
		return err
	}
	if c.listener != nil {
		_ = c.listener.Close()
	}
	c.mu.Lock()
	if c.stream != nil {
		_ = c.stream.Close()
	}
	c.mu.Unlock()
	if err := s.removeDir(c.dir); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.checkpoints, c.ID)
	s.mu.Unlock()
	return nil
}

func (s *Service) recoverCheckpoints(ctx context.Context) error {
	return s.load(ctx, sideCheckpoint, func(dir string, b []byte) error {
		c := &checkpointSession{dir: dir, created: time.Now(), conn: make(chan struct{}), rounds: make(chan struct{})}
		if err := json.Unmarshal(b, &c.checkpointRecord); err != nil {
			return err
		}
		close(c.conn)
		close(c.rounds)
		c.ctx, c.cancel = context.WithCancel(ctx)
		was := c.Phase
		if was == phaseFreezing {
			for i, x := range c.Containers {
				rctx, cancel := context.WithTimeout(ctx, finishTimeout)
				err := s.c.Runtime.Recover(rctx, x, filepath.Join(dir, scratchDir, fmt.Sprintf("dump%d", i)))
				cancel()
				if err != nil && !errors.Is(err, runtime.ErrGone) {
					log.G(ctx).WithError(err).WithField("session", c.ID).WithField("container", x.ID).Error("container of an interrupted checkpoint can not be kept frozen")
				}
			}
		}
		if was != phaseSent {
			c.Phase = phaseFailed
		}
		s.checkpoints[c.ID] = c
		log.G(ctx).WithField("session", c.ID).WithField("phase", was).Info("took up a checkpoint session")
		if c.Output != "" {
			s.recoverPod(ctx, c)
		}
		return nil
	})
}

// containers looks up the containers of a request and checks what both sides need.
func (s *Service) containers(ctx context.Context, sandbox string, names map[string]string, n int, want State) ([]Container, error) {
	if n == 0 {
		return nil, invalid("no containers are named")
	}
	if len(names) != n {
		return nil, invalid("a container is named twice")
	}
	var out []Container
	used := map[string]bool{}
	for id, name := range names {
		if name == "" || used[name] {
			return nil, invalid("container %s has no name or that of another one: %q", id, name)
		}
		used[name] = true
		c, err := s.c.Containers.Get(ctx, id)
		if err != nil {
			return nil, toStatus(fmt.Errorf("container %s: %w", name, err))
		}
		if c.SandboxID != sandbox {
			return nil, invalid("container %s belongs to sandbox %s, not to %s", name, c.SandboxID, sandbox)
		}
		if c.State != want {
			return nil, precondition("container %s is %s, not %s", name, c.State, want)
		}
		c.Name = name
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Container) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out, nil
}
