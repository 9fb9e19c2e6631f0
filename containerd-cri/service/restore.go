package service

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// restoreRecord is the part of a session that outlives the process. After Verified
// the restore needs only this and the images in memory.
type restoreRecord struct {
	ID         string
	Request    []byte
	Containers []Container
	Volumes    map[string]string
	Verified   bool
	Manifest   *checkpoint.Manifest
	Digest     string
	Bytes      uint64
	// Sandbox is the pod that RestorePod has made, empty for a migration.
	Sandbox string
	// First is the ID of the container that has to be restored before the others,
	// because it brings the System V IPC objects of the pod; often empty.
	First string
}

type restoreSession struct {
	restoreRecord
	dir      string
	address  string
	created  time.Time
	ctx      context.Context
	cancel   context.CancelFunc
	listener net.Listener
	// connected is closed when the writer came, done when the stream has ended and
	// err is valid.
	connected chan struct{}
	done      chan struct{}
	err       error

	mu       sync.Mutex
	attempts map[string]*attempt // by container ID
	// calls are the attempts that have not ended.
	calls sync.WaitGroup
	// barrier is nil until the first container is restored.
	barrier *barrier
	// firstDone is closed when the first container is restored or its call has ended.
	firstDone chan struct{}
	firstOnce sync.Once
	firstOK   bool // Valid when firstDone is closed.
	// started are the containers of a prepared pod for which StartContainer was called.
	started map[string]bool
}

// attempt is the restore of one container; there is never a second one, because a
// failed restore leaves an exited container behind.
type attempt struct {
	// done is closed when it has ended and the rest is valid.
	done     chan struct{}
	response *migration.RestoreContainerResponse
	err      error
}

func (r *restoreSession) containerIDs() []string {
	var ids []string
	for _, x := range r.Containers {
		ids = append(ids, x.ID)
	}
	return ids
}

func (r *restoreSession) expired(limit time.Duration) bool {
	select {
	case <-r.connected:
		return false
	case <-r.done:
		return false
	default:
		return time.Since(r.created) > limit
	}
}

func (r *restoreSession) scratch() string { return filepath.Join(r.dir, scratchDir) }

func (r *restoreSession) images(container string) string {
	return filepath.Join(r.scratch(), "images-"+container)
}

// PrepareRestore implements migration.MigrationServiceServer.
func (s *Service) PrepareRestore(ctx context.Context, r *migration.PrepareRestoreRequest) (*migration.PrepareRestoreResponse, error) {
	req, err := checkPrepare(r)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.restores[r.SessionId]; old != nil {
		if string(old.Request) != string(req) {
			return nil, status.Errorf(codes.AlreadyExists, "session %q was prepared with other arguments", r.SessionId)
		}
		return &migration.PrepareRestoreResponse{StreamAddress: old.address}, nil
	}
	names := map[string]string{}
	for _, c := range r.Containers {
		names[c.ContainerId] = c.Name
	}
	cs, err := s.containers(ctx, r.PodSandboxId, names, len(r.Containers), StateCreated)
	if err != nil {
		return nil, err
	}
	session := &restoreSession{
		restoreRecord: restoreRecord{ID: r.SessionId, Request: req, Containers: cs, Volumes: map[string]string{}},
		dir:           s.sessionDir(sideRestore, r.SessionId),
		created:       time.Now(),
		connected:     make(chan struct{}),
		done:          make(chan struct{}),
		attempts:      map[string]*attempt{},
		firstDone:     make(chan struct{}),
	}
	for _, c := range cs {
		if err := checkCreated(c); err != nil {
			return nil, err
		}
	}
	for _, v := range r.Volumes {
		session.Volumes[v.Name] = v.HostPath
	}
	session.ctx, session.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := s.openRestore(session); err != nil {
		session.cancel()
		_ = s.removeDir(session.dir)
		return nil, toStatus(err)
	}
	s.restores[r.SessionId] = session
	log.G(ctx).WithField("session", r.SessionId).Info("restore session prepared")
	return &migration.PrepareRestoreResponse{StreamAddress: session.address}, nil
}

func (s *Service) openRestore(r *restoreSession) error {
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		return err
	}
	if err := s.c.Scratch.Create(r.scratch()); err != nil {
		return err
	}
	for _, c := range r.Containers {
		if err := os.Mkdir(r.images(c.Name), 0o700); err != nil {
			return err
		}
	}
	if err := save(r.dir, r.restoreRecord); err != nil {
		return err
	}
	l, address, err := listen(r.dir)
	if err != nil {
		return err
	}
	r.listener, r.address = l, address
	s.background.Add(1)
	go func() {
		defer s.background.Done()
		defer close(r.done)
		conn := acceptOne(r.ctx, l)
		if conn == nil {
			r.err = status.Errorf(codes.Aborted, "session %q was finished before its stream began", r.ID)
			return
		}
		close(r.connected)
		defer conn.Close()
		defer context.AfterFunc(r.ctx, func() { conn.Close() })()
		_ = conn.SetDeadline(time.Now().Add(transferLimit))
		r.err = s.receive(r, conn)
		l := log.G(r.ctx).WithField("session", r.ID)
		if r.err != nil {
			l.WithError(r.err).Error("checkpoint refused")
			// What arrived is of no use: its memory is given back at once.
			if err := s.c.Scratch.Remove(r.scratch()); err != nil {
				l.WithError(err).Error("memory of a refused checkpoint can not be released yet")
			}
			return
		}
		l.WithField("bytes", r.Bytes).WithField("manifest", r.Digest).Info("checkpoint received")
	}()
	return nil
}

func (s *Service) receive(r *restoreSession, conn net.Conn) error {
	sink := newRestoreSink(r, s.c.FreeMemory, signs(conn))
	defer sink.abort()
	res, err := checkpoint.Read(conn, r.ID, sink, checkpoint.Limits{})
	if err != nil {
		if r.ctx.Err() != nil {
			return status.Errorf(codes.Aborted, "session %q was finished while its stream ran", r.ID)
		}
		return toStatus(err)
	}
	return s.accept(r, res, sink)
}

// signs writes back to the other end of a stream what its rounds tell. A writer that has
// gone needs none; what it sent counts.
func signs(conn io.Writer) func(checkpoint.Round) {
	var before time.Duration
	last := time.Now()
	return func(r checkpoint.Round) {
		took := time.Since(last)
		last = last.Add(took)
		if r.Number > 0 && !r.Final {
			sign := binary.BigEndian.AppendUint64([]byte{migration.StreamExpected}, uint64(rest(before, took)))
			_, _ = conn.Write(sign)
		}
		before = took
		if r.Ready {
			_, _ = conn.Write([]byte{migration.StreamReady})
		}
	}
}

// accept verifies what was received, and makes it ready to be restored.
func (s *Service) accept(r *restoreSession, res checkpoint.Result, sink *restoreSink) error {
	if err := s.fits(r, res.Manifest, sink); err != nil {
		return err
	}
	if err := sink.complete(); err != nil {
		return toStatus(err)
	}
	first, err := s.confined(r)
	if err != nil {
		return toStatus(err)
	}
	rec := r.restoreRecord
	rec.Verified, rec.Manifest, rec.Digest, rec.Bytes, rec.First = true, res.Manifest, res.Digest, res.Bytes, first
	if err := save(r.dir, rec); err != nil {
		return toStatus(err)
	}
	// Field by field: others read the containers meanwhile.
	r.Verified, r.Manifest, r.Digest, r.Bytes, r.First = true, rec.Manifest, rec.Digest, rec.Bytes, rec.First
	return nil
}

// fits compares the checkpoint with the containers it is meant for.
func (s *Service) fits(r *restoreSession, m *checkpoint.Manifest, sink *restoreSink) error {
	features, err := s.features()
	if err != nil {
		return toStatus(err)
	}
	if m.Source.Architecture != features.Architecture {
		return precondition("the checkpoint was made on %s, this node is %s", m.Source.Architecture, features.Architecture)
	}
	if len(m.Containers) != len(r.Containers) || len(m.Volumes) != len(r.Volumes) {
		return precondition("the checkpoint has %d containers and %d volumes, the session %d and %d", len(m.Containers), len(m.Volumes), len(r.Containers), len(r.Volumes))
	}
	for _, c := range r.Containers {
		mc := m.Container(c.Name)
		if mc == nil {
			return precondition("the checkpoint has no container %s", c.Name)
		}
		if mc.ImageID != c.ImageID {
			return precondition("container %s runs image %s on the source, %s here: their files differ", c.Name, mc.ImageID, c.ImageID)
		}
		for _, p := range []checkpoint.Part{
			{Kind: checkpoint.KindRootfs, Container: c.Name},
			{Kind: checkpoint.KindImage, Container: c.Name, Name: "inventory.img"},
		} {
			if !sink.seen[p] {
				return toStatus(fmt.Errorf("%w: %s is missing", checkpoint.ErrFormat, p))
			}
		}
	}
	for name := range r.Volumes {
		if !sink.seen[checkpoint.Part{Kind: checkpoint.KindVolume, Name: name}] {
			return toStatus(fmt.Errorf("%w: volume %s is missing", checkpoint.ErrFormat, name))
		}
	}
	return nil
}

// confined checks what CRIU would do with the images, gives them the host name of this
// pod, and the IPC objects, which every image set holds, to one container.
func (s *Service) confined(r *restoreSession) (first string, err error) {
	for _, c := range r.Containers {
		if err := s.c.CheckImages(r.images(c.Name), c.Confinement); err != nil {
			return "", fmt.Errorf("container %s: %w", c.Name, err)
		}
		if c.HostName == "" {
			continue
		}
		if err := criu.SetHostName(r.images(c.Name), c.HostName, c.DomainName); err != nil {
			return "", fmt.Errorf("container %s: %w", c.Name, err)
		}
	}
	if len(r.Containers) == 1 {
		return "", nil
	}
	owner := -1
	for i, c := range r.Containers {
		objects, mapped, err := criu.IPC(r.images(c.Name))
		if err != nil {
			return "", fmt.Errorf("container %s: %w", c.Name, err)
		}
		if !objects {
			return "", nil
		}
		if mapped && owner >= 0 {
			return "", fmt.Errorf("containers %s and %s share System V memory, which can not be restored: %w", r.Containers[owner].Name, c.Name, errdefs.ErrFailedPrecondition)
		}
		if mapped {
			owner = i
		}
	}
	owner = max(owner, 0)
	for i, c := range r.Containers {
		if i == owner {
			continue
		}
		if err := criu.DropIPC(r.images(c.Name)); err != nil {
			return "", err
		}
	}
	return r.Containers[owner].ID, nil
}

// awaitFirst waits until the container with the IPC objects is restored. After a
// restart of this process only the CRI service knows whether it was.
func (s *Service) awaitFirst(r *restoreSession) error {
	c, err := s.c.Containers.Get(r.ctx, r.First)
	if err == nil && c.State == StateCreated {
		select {
		case <-r.firstDone:
		case <-r.ctx.Done():
			return status.Errorf(codes.Aborted, "session %q was finished", r.ID)
		}
		if !r.firstOK {
			return precondition("container %s, which brings the pod's IPC objects, was not restored", c.Name)
		}
		return nil
	}
	if err == nil && c.State != StateRunning {
		err = precondition("container %s, which brings the pod's IPC objects, was not restored", c.Name)
	}
	return err
}

// endFirst says what became of the container with the IPC objects.
func (r *restoreSession) endFirst(ok bool) {
	r.firstOnce.Do(func() {
		r.firstOK = ok
		close(r.firstDone)
	})
}

func (s *Service) restore(id string) (*restoreSession, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.restores[id]
	if r == nil || r.Sandbox != "" {
		return nil, status.Errorf(codes.NotFound, "no restore session %q", id)
	}
	return r, nil
}

// VerifyRestore implements migration.MigrationServiceServer.
func (s *Service) VerifyRestore(ctx context.Context, q *migration.VerifyRestoreRequest) (*migration.VerifyRestoreResponse, error) {
	r, err := s.restore(q.SessionId)
	if err != nil {
		return nil, err
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		return nil, toStatus(fmt.Errorf("session %q: the stream has not ended: %w", q.SessionId, ctx.Err()))
	}
	if r.err != nil {
		return nil, r.err
	}
	return &migration.VerifyRestoreResponse{StreamBytes: r.Bytes, ManifestDigest: r.Digest}, nil
}

// RestoreContainer implements migration.MigrationServiceServer.
func (s *Service) RestoreContainer(ctx context.Context, q *migration.RestoreContainerRequest) (*migration.RestoreContainerResponse, error) {
	r, err := s.restore(q.SessionId)
	if err != nil {
		return nil, err
	}
	select {
	case <-r.done:
	default:
		return nil, precondition("session %q has not received its checkpoint yet", q.SessionId)
	}
	if r.err != nil {
		return nil, precondition("session %q has no checkpoint to restore: %v", q.SessionId, r.err)
	}
	var c *Container
	for i := range r.Containers {
		if r.Containers[i].ID == q.ContainerId {
			c = &r.Containers[i]
		}
	}
	if c == nil {
		return nil, status.Errorf(codes.NotFound, "container %s is not part of session %q", q.ContainerId, q.SessionId)
	}
	r.mu.Lock()
	if r.ctx.Err() != nil {
		r.mu.Unlock()
		return nil, status.Errorf(codes.Aborted, "session %q was finished", q.SessionId)
	}
	if r.barrier == nil {
		r.barrier = newBarrier(r.Containers)
	}
	a := r.attempts[c.ID]
	if a == nil {
		a = &attempt{done: make(chan struct{})}
		r.attempts[c.ID] = a
		r.calls.Add(1)
		go func() {
			defer r.calls.Done()
			defer close(a.done)
			a.response, a.err = s.attempt(r, c)
		}()
	}
	r.mu.Unlock()
	r.barrier.join(c.ID)
	defer r.barrier.leave(c.ID)
	select {
	case <-a.done:
		return a.response, a.err
	case <-ctx.Done():
		return nil, toStatus(fmt.Errorf("restore of container %s: nobody waits for it any more: %w", c.Name, ctx.Err()))
	}
}

// attempt restores one container. Cut off in the middle, a restore could still end
// with running processes, so it is bound to the session and not to the call that began
// it: it runs to its end, or is held at the barrier before anything runs.
func (s *Service) attempt(r *restoreSession, c *Container) (_ *migration.RestoreContainerResponse, err error) {
	start := time.Now()
	l := log.G(r.ctx).WithField("session", r.ID).WithField("container", c.ID)
	defer func() {
		if err != nil {
			err = toStatus(fmt.Errorf("restore of container %s: %w", c.Name, err))
			l.WithError(err).Error("restore failed")
		}
	}()
	if r.First == c.ID {
		defer r.endFirst(false)
	} else if r.First != "" {
		if err := s.awaitFirst(r); err != nil {
			r.barrier.abort(err)
			return nil, err
		}
	}
	if err := s.resume(r, c); err != nil {
		return nil, err
	}
	if r.First == c.ID {
		r.endFirst(true)
	}
	now := time.Now()
	l.WithField("duration", now.Sub(start)).Info("container restored")
	return &migration.RestoreContainerResponse{ResumedAt: now.UnixNano(), RestoreDuration: int64(now.Sub(start))}, nil
}

// resume restores one container and returns when its processes run.
func (s *Service) resume(r *restoreSession, c *Container) error {
	// One that was restored by an earlier process of this service is left alone.
	now, err := s.c.Containers.Get(r.ctx, c.ID)
	if err == nil && now.State != StateCreated {
		err = precondition("container %s is %s already", c.Name, now.State)
	}
	if err != nil {
		r.barrier.abort(err)
		return err
	}
	err = s.through(r, c, r.barrier, func() {
		if r.First == c.ID {
			r.endFirst(true)
		}
	}, time.Unix(0, r.Manifest.Container(c.Name).StartedAt))
	if err != nil {
		r.barrier.abort(err)
	}
	return err
}

// through restores one container and lets it run when the barrier does. restored is
// called in between.
func (s *Service) through(r *restoreSession, c *Container, b *barrier, restored func(), startedAt time.Time) error {
	g, err := b.gate(c.ID, restored, func() {
		l := log.G(r.ctx).WithField("session", r.ID).WithField("container", c.ID)
		l.Warn("CRIU has ended in the middle of a restore, ending what it has left")
		if err := s.c.Containers.Abandon(context.WithoutCancel(r.ctx), c.ID); err != nil {
			l.WithError(err).Error("the end of a restore without CRIU failed")
		}
	})
	if err != nil {
		return err
	}
	return g.finish(c, s.start(r, c, s.c.CRIUOptions+g.options(), startedAt))
}

// work is where CRIU leaves its log.
func (r *restoreSession) work(c *Container) string {
	return filepath.Join(r.scratch(), "work-"+c.Name)
}

func (s *Service) start(r *restoreSession, c *Container, options string, startedAt time.Time) error {
	work := r.work(c)
	if err := os.MkdirAll(work, 0o700); err != nil {
		return err
	}
	conf := filepath.Join(r.scratch(), "criu-"+c.Name+".conf")
	if err := os.WriteFile(conf, []byte(options), 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), restoreTimeout)
	defer cancel()
	return s.c.Containers.Start(ctx, c.ID, Restore{Images: r.images(c.Name), Work: work, Config: conf, StartedAt: startedAt})
}

// FinishRestore implements migration.MigrationServiceServer.
func (s *Service) FinishRestore(ctx context.Context, q *migration.FinishRestoreRequest) (*migration.FinishRestoreResponse, error) {
	if err := checkSession(q.SessionId); err != nil {
		return nil, err
	}
	s.mu.Lock()
	r := s.restores[q.SessionId]
	s.mu.Unlock()
	if r != nil {
		if err := s.endRestore(r); err != nil {
			return nil, toStatus(err)
		}
		log.G(ctx).WithField("session", q.SessionId).Info("restore session finished")
	}
	return &migration.FinishRestoreResponse{}, nil
}

// end lets nothing resume any more and no attempt begin.
func (r *restoreSession) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cancel()
	if r.barrier != nil {
		r.barrier.abort(status.Errorf(codes.Aborted, "session %q was finished", r.ID))
	}
}

func (s *Service) endRestore(r *restoreSession) error {
	r.end()
	if r.listener != nil {
		_ = r.listener.Close()
	}
	<-r.done
	// A restore that runs reads the images; it has deadlines of its own.
	r.calls.Wait()
	if r.Verified {
		// One that ended with an earlier process of this service had nobody to clean up.
		for _, c := range r.Containers {
			if err := s.c.Containers.Clean(context.WithoutCancel(r.ctx), c.ID, r.work(&c)); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.restores[r.ID] != r {
		return nil
	}
	if err := s.removeDir(r.dir); err != nil {
		return err
	}
	delete(s.restores, r.ID)
	return nil
}

func (s *Service) recoverRestores(ctx context.Context) error {
	return s.load(ctx, sideRestore, func(dir string, b []byte) error {
		r := &restoreSession{dir: dir, created: time.Now(), connected: make(chan struct{}), done: make(chan struct{}), attempts: map[string]*attempt{}, firstDone: make(chan struct{})}
		if err := json.Unmarshal(b, &r.restoreRecord); err != nil {
			return err
		}
		if r.Verified && r.Manifest == nil {
			return errors.New("a verified session without a manifest")
		}
		close(r.done)
		if !r.Verified {
			r.err = status.Errorf(codes.Aborted, "session %q lost its stream when the runtime was restarted", r.ID)
			if err := s.c.Scratch.Remove(r.scratch()); err != nil {
				return err
			}
		}
		r.ctx, r.cancel = context.WithCancel(ctx)
		s.restores[r.ID] = r
		log.G(ctx).WithField("session", r.ID).WithField("verified", r.Verified).Info("took up a restore session")
		return nil
	})
}
