package service

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// A checkpoint of a pod, as the CRI's CheckpointPod and RestorePod know it, is a
// directory with two files: the stream that a migration sends, and its manifest once
// more, to be read before anything is created. The manifest is written last, so a
// checkpoint that was cut off has none.
const (
	podStream   = migration.PodStream
	podManifest = migration.PodManifest
	podSession  = migration.PodSession
	// podPrefix begins the names of their sessions in this process.
	podPrefix = "podmig.dev/pod/"
)

// podOptions reads the options of both calls.
func podOptions(options map[string]string) ([]*migration.Volume, error) {
	var vs []*migration.Volume
	for k, v := range options {
		name, ok := strings.CutPrefix(k, migration.VolumeOption)
		if !ok {
			return nil, invalid("unknown option %q, known is %sNAME", k, migration.VolumeOption)
		}
		vs = append(vs, &migration.Volume{Name: name, HostPath: v})
	}
	slices.SortFunc(vs, func(a, b *migration.Volume) int { return strings.Compare(a.Name, b.Name) })
	return vs, checkVolumes(vs)
}

func needDeadline(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		return invalid("the call needs a deadline")
	}
	return nil
}

// because says of what an error is the cause, and keeps its code.
func because(what string, err error) error {
	st, _ := status.FromError(toStatus(err))
	return status.Errorf(st.Code(), "%s: %s", what, st.Message())
}

// openDir opens a directory that a caller has named, so that everything further
// happens below it, whatever becomes of its name.
func openDir(path string) (*os.Root, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return nil, invalid("%q is not a clean absolute path", path)
	}
	before, err := os.Lstat(path)
	if err != nil {
		return nil, invalid("directory of the checkpoint: %v", err)
	}
	if !before.IsDir() {
		return nil, invalid("%s is not a directory", path)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, invalid("directory of the checkpoint: %v", err)
	}
	if now, err := root.Stat("."); err != nil || !os.SameFile(before, now) {
		root.Close()
		return nil, invalid("%s is another directory than a moment ago", path)
	}
	return root, nil
}

// openOutput opens the directory for a new checkpoint: empty, and nobody else may
// put files into it.
func openOutput(path string) (*os.Root, error) {
	root, err := openDir(path)
	if err != nil {
		return nil, err
	}
	err = func() error {
		st, err := root.Stat(".")
		if err != nil {
			return err
		}
		if st.Mode().Perm()&0o022 != 0 {
			return invalid("%s has mode %o: others may write to it", path, st.Mode().Perm())
		}
		files, err := fs.ReadDir(root.FS(), ".")
		if err != nil {
			return err
		}
		if len(files) != 0 {
			return status.Errorf(codes.AlreadyExists, "%s is not empty, it has %s", path, files[0].Name())
		}
		return nil
	}()
	if err != nil {
		root.Close()
		return nil, toStatus(err)
	}
	return root, nil
}

// clearOutput removes what a failed checkpoint has left in its directory.
func clearOutput(root *os.Root) error {
	var errs []error
	for _, name := range []string{podManifest, podStream} {
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// CheckpointPod is the CRI's call of this name: the named containers are frozen
// together, written to a directory, and run on before it returns.
func (s *Service) CheckpointPod(ctx context.Context, r *cri.CheckpointPodRequest) (_ *cri.CheckpointPodResponse, err error) {
	if err := needDeadline(ctx); err != nil {
		return nil, err
	}
	volumes, err := podOptions(r.Options)
	if err != nil {
		return nil, err
	}
	sandbox, cs, err := s.runningPod(ctx, r)
	if err != nil {
		return nil, err
	}
	root, err := openOutput(r.OutputPath)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := s.movable(ctx, cs); err != nil {
		return nil, err
	}
	c := &checkpointSession{
		checkpointRecord: checkpointRecord{ID: podPrefix + sandbox, Phase: phasePrepared, Output: r.OutputPath},
		containers:       cs,
		volumes:          volumes,
		created:          time.Now(),
		conn:             make(chan struct{}),
		rounds:           make(chan struct{}),
	}
	// Nothing is captured before all are frozen, so there are no rounds.
	close(c.rounds)
	c.dir = s.sessionDir(sideCheckpoint, c.ID)
	for _, x := range cs {
		c.Containers = append(c.Containers, x.Container)
		c.memory = append(c.memory, s.c.Runtime.Track(x.Container))
	}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := s.enter(c); err != nil {
		c.cancel()
		c.forget()
		return nil, toStatus(err)
	}
	digest, err := s.writePod(ctx, c, root)
	// Neither a deadline nor the end of the caller may leave the pod frozen.
	if eerr := s.endCheckpoint(context.WithoutCancel(ctx), c, migration.Outcome_OUTCOME_RESUME); eerr != nil {
		c.abandon()
		err = errors.Join(err, fmt.Errorf("the containers can not be resumed yet: %w", eerr))
	}
	if err == nil {
		err = sealOutput(root, c.manifest, digest)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if cerr := clearOutput(root); cerr != nil {
			log.G(ctx).WithError(cerr).WithField("path", r.OutputPath).Error("a failed checkpoint can not be removed")
		}
		return nil, because("checkpoint of pod sandbox "+sandbox, err)
	}
	return &cri.CheckpointPodResponse{}, nil
}

// runningPod looks up the sandbox and the containers of a request.
func (s *Service) runningPod(ctx context.Context, r *cri.CheckpointPodRequest) (string, []Container, error) {
	st, err := s.c.Pods.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: r.PodSandboxId})
	if err != nil {
		return "", nil, toStatus(fmt.Errorf("pod sandbox %q: %w", r.PodSandboxId, err))
	}
	sandbox := st.GetStatus().GetId()
	if st.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY {
		return "", nil, precondition("pod sandbox %s is not running", sandbox)
	}
	names := map[string]string{}
	for _, id := range r.ContainerIds {
		// The CRI accepts short IDs, so two of them may be one container.
		c, err := s.c.Containers.Get(ctx, id)
		if err != nil {
			return "", nil, toStatus(fmt.Errorf("container %q: %w", id, err))
		}
		if _, twice := names[c.ID]; twice {
			return "", nil, invalid("container %s is named twice", c.ID)
		}
		names[c.ID] = c.Name
	}
	cs, err := s.containers(ctx, sandbox, names, len(r.ContainerIds), StateRunning)
	if err != nil {
		return "", nil, err
	}
	for _, c := range cs {
		if frozen, err := s.c.Runtime.Frozen(ctx, c.Container); err != nil {
			return "", nil, toStatus(fmt.Errorf("container %s: %w", c.Name, err))
		} else if frozen {
			return "", nil, precondition("container %s is paused, by somebody else", c.Name)
		}
	}
	return sandbox, cs, nil
}

// movable refuses, before anything is frozen, what the preflight finds.
func (s *Service) movable(ctx context.Context, cs []Container) error {
	findings, _, err := s.inspect(ctx, cs)
	if err != nil {
		return err
	}
	for _, f := range findings {
		if f.Blocking {
			return precondition("%s %s", f.Message, f.Cure)
		}
	}
	return nil
}

// enter makes the session known and its directory.
func (s *Service) enter(c *checkpointSession) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.busy(c.containers, anySession); err != nil {
		return err
	}
	err := func() error {
		if err := os.Mkdir(c.dir, 0o700); err != nil {
			return err
		}
		if err := s.c.Scratch.Create(filepath.Join(c.dir, scratchDir)); err != nil {
			return err
		}
		return save(c.dir, c.checkpointRecord)
	}()
	if err != nil {
		return errors.Join(err, s.removeDir(c.dir))
	}
	s.checkpoints[c.ID] = c
	return nil
}

func anySession(*checkpointSession) bool { return true }

func podSessions(c *checkpointSession) bool { return c.Output != "" }

// busy refuses containers that another session has in its hands. The caller holds mu.
func (s *Service) busy(cs []Container, counts func(*checkpointSession) bool) error {
	for _, other := range s.checkpoints {
		for _, id := range other.containerIDs() {
			if counts(other) && slices.ContainsFunc(cs, func(c Container) bool { return c.ID == id }) {
				return precondition("container %s is being checkpointed by session %q", id, other.ID)
			}
		}
	}
	return nil
}

// writePod freezes the containers and writes the stream. They are frozen afterwards.
func (s *Service) writePod(ctx context.Context, c *checkpointSession, root *os.Root) (digest string, err error) {
	c.op.Lock()
	defer c.op.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	f, err := root.OpenFile(podStream, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := bufio.NewWriterSize(f, 1<<20)
	if c.out, err = checkpoint.NewWriter(buf, podSession); err != nil {
		return "", err
	}
	res, err := s.freeze(ctx, c)
	if err != nil {
		return "", errors.Join(ctx.Err(), err)
	}
	log.G(ctx).WithField("session", c.ID).WithField("bytes", res.StreamBytes).Info("checkpoint of a pod written")
	return c.digest, buf.Flush()
}

// sealOutput makes a written checkpoint durable and complete.
func sealOutput(root *os.Root, m *checkpoint.Manifest, digest string) error {
	if err := syncFile(root, podStream); err != nil {
		return err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if sum(b) != digest {
		return errors.New("the manifest has changed since it was sent")
	}
	f, err := root.OpenFile(podManifest, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return syncFile(root, ".")
}

func syncFile(root *os.Root, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// abandon leaves a session whose containers are still frozen to the collector.
func (c *checkpointSession) abandon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abandoned = true
}

// recoverPod ends a checkpoint of a pod that the end of the process has cut off: its
// caller has an error already, so the containers run on.
func (s *Service) recoverPod(ctx context.Context, c *checkpointSession) {
	l := log.G(ctx).WithField("session", c.ID)
	if root, err := openDir(c.Output); err == nil {
		err = clearOutput(root)
		root.Close()
		if err != nil {
			l.WithError(err).Error("the files of an interrupted checkpoint can not be removed")
		}
	}
	if err := s.endCheckpoint(ctx, c, migration.Outcome_OUTCOME_RESUME); err != nil {
		c.abandon()
		l.WithError(err).Error("containers of an interrupted checkpoint can not be resumed yet")
	}
}
