package service

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// removeTimeout bounds the removal of a pod that could not be restored.
const removeTimeout = 2 * time.Minute

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// RestorePod is the CRI's call of this name. It makes a pod of a directory that
// CheckpointPod has written. The containers are created, their files and their memory
// in place; StartContainer resumes them.
func (s *Service) RestorePod(ctx context.Context, q *cri.RestorePodRequest) (_ *cri.RestorePodResponse, err error) {
	if err := needDeadline(ctx); err != nil {
		return nil, err
	}
	volumes, err := podOptions(q.Options)
	if err != nil {
		return nil, err
	}
	if q.GetConfig().GetMetadata() == nil {
		return nil, invalid("the sandbox has no configuration")
	}
	root, err := openDir(q.CheckpointPath)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	m, digest, err := readManifest(root)
	if err != nil {
		return nil, toStatus(err)
	}
	if err := sameContainers(m, q.ContainerConfigs); err != nil {
		return nil, err
	}
	if err := sameVolumes(m, volumes); err != nil {
		return nil, err
	}
	sandbox, err := s.c.Pods.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: q.Config, RuntimeHandler: q.RuntimeHandler})
	if err != nil {
		return nil, toStatus(err)
	}
	id := podPrefix + sandbox.PodSandboxId
	r := &restoreSession{
		restoreRecord: restoreRecord{ID: id, Sandbox: sandbox.PodSandboxId, Volumes: map[string]string{}},
		dir:           s.sessionDir(sideRestore, id), created: time.Now(),
		connected: make(chan struct{}), done: make(chan struct{}), firstDone: make(chan struct{}),
	}
	for _, v := range volumes {
		r.Volumes[v.Name] = v.HostPath
	}
	r.ctx, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	res, err := s.restorePod(ctx, r, q, root, m, digest)
	if err == nil {
		err = ctx.Err() // Nobody hears of the pod.
	}
	if err != nil {
		r.err = because("restore of pod "+q.Config.Metadata.Name, err)
		close(r.done)
		if derr := s.dropPod(ctx, r); derr != nil {
			log.G(ctx).WithError(derr).WithField("session", r.ID).Error("a pod that was not restored can not be removed yet")
		}
		return nil, r.err
	}
	close(r.done)
	log.G(ctx).WithField("session", r.ID).WithField("bytes", r.Bytes).WithField("manifest", r.Digest).Info("pod prepared from a checkpoint")
	return res, nil
}

func (s *Service) restorePod(ctx context.Context, r *restoreSession, q *cri.RestorePodRequest, root *os.Root, m *checkpoint.Manifest, digest string) (*cri.RestorePodResponse, error) {
	s.mu.Lock()
	s.restores[r.ID] = r
	s.mu.Unlock()
	// With the record a restart of this process finds the sandbox and removes it.
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		return nil, err
	}
	if err := save(r.dir, r.restoreRecord); err != nil {
		return nil, err
	}
	if err := s.c.Scratch.Create(r.scratch()); err != nil {
		return nil, err
	}
	res := &cri.RestorePodResponse{PodSandboxId: r.Sandbox}
	names := map[string]string{}
	for _, c := range q.ContainerConfigs {
		created, err := s.c.Pods.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: r.Sandbox, Config: c, SandboxConfig: q.Config})
		if err != nil {
			return nil, because("container "+c.Metadata.Name, err)
		}
		names[created.ContainerId] = c.Metadata.Name
		res.RestoredContainers = append(res.RestoredContainers, &cri.RestoredContainer{Name: c.Metadata.Name, ContainerId: created.ContainerId})
	}
	cs, err := s.containers(ctx, r.Sandbox, names, len(q.ContainerConfigs), StateCreated)
	if err != nil {
		return nil, err
	}
	// The order of the request is the one in which the caller starts them.
	order := func(name string) int {
		return slices.IndexFunc(q.ContainerConfigs, func(c *cri.ContainerConfig) bool { return c.Metadata.Name == name })
	}
	slices.SortFunc(cs, func(a, b Container) int { return order(a.Name) - order(b.Name) })
	for _, c := range cs {
		if err := checkCreated(c); err != nil {
			return nil, err
		}
		if err := sameProcess(c, m.Container(c.Name)); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	r.Containers = cs
	s.mu.Unlock()
	for _, c := range cs {
		if err := os.Mkdir(r.images(c.Name), 0o700); err != nil {
			return nil, err
		}
	}
	if err := s.readPod(ctx, r, root, digest); err != nil {
		return nil, err
	}
	if r.First != "" && r.First != cs[0].ID {
		return nil, precondition("container_configs has to begin with the container that has System V memory mapped, which is not %s", cs[0].Name)
	}
	return res, nil
}

// readPod puts what the stream holds in its places.
func (s *Service) readPod(ctx context.Context, r *restoreSession, root *os.Root, digest string) error {
	f, err := openPlain(root, podStream)
	if err != nil {
		return err
	}
	defer f.Close()
	sink := newRestoreSink(r, s.c.FreeMemory, func(checkpoint.Round) {})
	defer sink.abort()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	res, err := checkpoint.Read(&callReader{ctx: ctx, in: f}, podSession, sink, checkpoint.Limits{})
	if err != nil {
		return err
	}
	if res.Bytes != uint64(st.Size()) {
		return fmt.Errorf("%w: %s has %d bytes, %d were expected", checkpoint.ErrFormat, podStream, st.Size(), res.Bytes)
	}
	if res.Digest != digest {
		return fmt.Errorf("%w: %s is not the manifest of the stream", checkpoint.ErrDigest, podManifest)
	}
	return s.accept(r, res, sink)
}

// callReader ends with the call.
type callReader struct {
	ctx context.Context
	in  io.Reader
}

func (c *callReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.in.Read(b)
}

// openPlain opens a file of a checkpoint for reading. Links are not followed.
func openPlain(root *os.Root, name string) (*os.File, error) {
	before, err := root.Lstat(name)
	if err != nil {
		return nil, invalid("this is no checkpoint: %v", err)
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, invalid("this is no checkpoint: %v", err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || !os.SameFile(before, st) {
		f.Close()
		return nil, invalid("this is no checkpoint: %s is not a plain file", name)
	}
	return f, nil
}

func readManifest(root *os.Root) (*checkpoint.Manifest, string, error) {
	f, err := openPlain(root, podManifest)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	var b bytes.Buffer
	if n, err := io.Copy(&b, io.LimitReader(f, checkpoint.MaxManifest+1)); err != nil {
		return nil, "", err
	} else if n > checkpoint.MaxManifest {
		return nil, "", fmt.Errorf("%w: %s has more than %d bytes", checkpoint.ErrFormat, podManifest, checkpoint.MaxManifest)
	}
	m, err := checkpoint.ParseManifest(b.Bytes(), podSession)
	return m, sum(b.Bytes()), err
}

// sameContainers compares the containers that are asked for with those there are.
func sameContainers(m *checkpoint.Manifest, configs []*cri.ContainerConfig) error {
	if len(configs) == 0 {
		return invalid("no containers are named")
	}
	seen := map[string]bool{}
	for _, c := range configs {
		name := c.GetMetadata().GetName()
		if name == "" || seen[name] {
			return invalid("a container has no name or that of another one: %q", name)
		}
		seen[name] = true
		if m.Container(name) == nil {
			return precondition("the checkpoint has no container %s", name)
		}
	}
	for _, c := range m.Containers {
		if !seen[c.Name] {
			return precondition("container %s of the checkpoint has no configuration", c.Name)
		}
	}
	return nil
}

func sameVolumes(m *checkpoint.Manifest, vs []*migration.Volume) error {
	have := slices.Sorted(slices.Values(m.Volumes))
	var want []string
	for _, v := range vs {
		want = append(want, v.Name)
	}
	if !slices.Equal(have, want) {
		return precondition("the checkpoint holds the volumes %q, the options %sNAME name %q", have, migration.VolumeOption, want)
	}
	return nil
}

// sameProcess compares the process that a container would start with the one in the
// checkpoint. The latter is what runs in the end, so a difference is a mistake of the
// caller, or of somebody who wants another process to run under this name.
func sameProcess(c Container, m *checkpoint.Container) error {
	p := m.Process
	if p == nil {
		return fmt.Errorf("%w: it does not describe the process of container %s", checkpoint.ErrFormat, c.Name)
	}
	differ := func(what string, have, want any) error {
		return precondition("container %s: %s is %v in the checkpoint, %v in its configuration", c.Name, what, have, want)
	}
	if m.ImageID != c.ImageID {
		return differ("the image", m.ImageID, c.ImageID)
	}
	if !slices.Equal(m.Args, c.Args) {
		return differ("the command", fmt.Sprintf("%q", m.Args), fmt.Sprintf("%q", c.Args))
	}
	if p.Cwd != c.Process.Cwd {
		return differ("the working directory", p.Cwd, c.Process.Cwd)
	}
	if p.UID != c.Process.UID || p.GID != c.Process.GID {
		return differ("the user", fmt.Sprintf("%d:%d", p.UID, p.GID), fmt.Sprintf("%d:%d", c.Process.UID, c.Process.GID))
	}
	if !slices.Equal(slices.Sorted(slices.Values(p.Groups)), slices.Sorted(slices.Values(c.Process.Groups))) {
		return differ("the set of groups", p.Groups, c.Process.Groups)
	}
	have, want := environment(p.Env), environment(c.Process.Env)
	for k := range have {
		// The values may be secrets.
		if v, ok := want[k]; !ok || v != have[k] {
			return precondition("container %s: environment variable %s is not what it is in the checkpoint", c.Name, k)
		}
	}
	for k := range want {
		if _, ok := have[k]; !ok {
			return precondition("container %s: the checkpoint has no environment variable %s", c.Name, k)
		}
	}
	return nil
}

func environment(env []string) map[string]string {
	out := map[string]string{}
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		out[k] = v
	}
	return out
}

// dropPod removes a pod that was not restored, then its session. After an error both
// are left to the collector.
func (s *Service) dropPod(ctx context.Context, r *restoreSession) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if _, err := s.c.Pods.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: r.Sandbox}); err != nil {
		return err
	}
	if _, err := s.c.Pods.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: r.Sandbox}); err != nil {
		return err
	}
	return s.endRestore(r)
}

// prepared returns the session of a container that RestorePod has created, nil for
// all other containers.
func (s *Service) prepared(id string) (*restoreSession, *Container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.restores {
		if r.Sandbox == "" {
			continue
		}
		for i := range r.Containers {
			// The CRI accepts short IDs.
			if id != "" && strings.HasPrefix(r.Containers[i].ID, id) {
				return r, &r.Containers[i]
			}
		}
	}
	return nil, nil
}

// StartContainer resumes a container that RestorePod has created. It reports false
// for every other container, which starts as always.
func (s *Service) StartContainer(ctx context.Context, id string) (bool, error) {
	r, c := s.prepared(id)
	if r == nil {
		return false, nil
	}
	err := s.startPrepared(ctx, r, c)
	l := log.G(ctx).WithField("session", r.ID).WithField("container", c.ID)
	if err != nil {
		err = because("restore of container "+c.Name, err)
		l.WithError(err).Error("restore failed")
	} else {
		l.Info("container restored")
	}
	r.mu.Lock()
	all := len(r.started) == len(r.Containers)
	r.mu.Unlock()
	if all {
		if err := s.endRestore(r); err != nil {
			l.WithError(err).Error("memory of a restored pod can not be released yet")
		}
	}
	return true, err
}

func (s *Service) startPrepared(ctx context.Context, r *restoreSession, c *Container) error {
	select {
	case <-r.done:
	default:
		return precondition("the pod is still being prepared")
	}
	if r.err != nil {
		return precondition("the pod was not prepared: %v", r.err)
	}
	now, err := s.c.Containers.Get(ctx, c.ID)
	if err != nil {
		return err
	}
	if now.State != StateCreated {
		return precondition("it is %s, only a created container can be started", now.State)
	}
	if r.First != "" && r.First != c.ID {
		first, err := s.c.Containers.Get(ctx, r.First)
		if err != nil {
			return err
		}
		if first.State != StateRunning {
			return precondition("container %s brings the System V objects of the pod and has to be started before", first.Name)
		}
	}
	r.mu.Lock()
	if r.started[c.ID] || r.ctx.Err() != nil {
		r.mu.Unlock()
		return precondition("it was started by an earlier call")
	}
	if r.started == nil {
		r.started = map[string]bool{}
	}
	r.started[c.ID] = true
	r.calls.Add(1)
	r.mu.Unlock()
	defer r.calls.Done()
	// Each container resumes when its caller asks for it, and not when it has gone
	// meanwhile: nobody would know of the processes.
	b := newBarrier([]Container{*c})
	b.join(c.ID)
	return s.through(r, c, b, func() {
		if err := ctx.Err(); err != nil {
			b.abort(fmt.Errorf("the caller has gone: %w", err))
		}
	}, time.Now())
}

// spent tells whether nothing of a prepared pod is left to be started.
func (s *Service) spent(ctx context.Context, r *restoreSession) bool {
	for _, id := range r.containerIDs() {
		c, err := s.c.Containers.Get(ctx, id)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil || c.State == StateCreated {
			return false
		}
	}
	return true
}

// collectPod ends what is left of a prepared pod.
func (s *Service) collectPod(ctx context.Context, r *restoreSession) error {
	select {
	case <-r.done:
	default:
		return nil
	}
	if r.err != nil {
		return s.dropPod(ctx, r)
	}
	if s.spent(ctx, r) {
		return s.endRestore(r)
	}
	return nil
}

// checkCreated refuses containers whose files could not be put in their place.
func checkCreated(c Container) error {
	if c.UpperDir == "" {
		return precondition("container %s has no writable layer that can be written: only the overlayfs snapshotter is supported", c.Name)
	}
	if c.TTY {
		return precondition("container %s has a terminal, which can not be moved: run it without tty", c.Name)
	}
	if c.Runtime != "" && c.Runtime != runcShim {
		return precondition("container %s runs with %s, which does not restore with CRIU and runc", c.Name, c.Runtime)
	}
	return nil
}
