package service

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
	"podmig.dev/podmig/containerd-cri/runtime/criu"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// Config is what a Service is made of.
type Config struct {
	// Dir holds the sessions. It survives a restart of the process, not of the node.
	Dir        string
	Containers Containers
	Pods       Pods
	Runtime    runtime.Runtime
	Scratch    Scratch
	// CheckImages decides whether CRIU may act on images from a stream.
	CheckImages func(images string, c criu.Confinement) error
	// RuntimeName and RuntimeVersion name the CRI runtime.
	RuntimeName, RuntimeVersion string
	// CRIUOptions is the content of CRIU's configuration file for restores.
	CRIUOptions string
	// FreeMemory returns the memory that is left on the node; default what the kernel
	// says.
	FreeMemory func() (uint64, error)
	// ConnectTimeout is how long a stream waits for its reader or writer before the
	// session is collected; default ten minutes.
	ConnectTimeout time.Duration
}

// Service implements migration.MigrationServiceServer.
type Service struct {
	migration.UnimplementedMigrationServiceServer
	c Config

	mu          sync.Mutex
	checkpoints map[string]*checkpointSession
	restores    map[string]*restoreSession
	stop        context.CancelFunc
	background  sync.WaitGroup
	features    func() (runtime.Features, error)
}

// Limits of the service itself; a caller's deadline may be shorter.
const (
	freezeTimeout  = 10 * time.Second
	finishTimeout  = 60 * time.Second
	connectGrace   = 5 * time.Second
	transferLimit  = 30 * time.Minute
	restoreTimeout = 10 * time.Minute
	collectPeriod  = time.Minute
	connectTimeout = 10 * time.Minute
)

// New returns a service and takes up the sessions that an earlier process left in
// the directory. ctx carries the logger; Close ends everything.
func New(ctx context.Context, c Config) (*Service, error) {
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	if c.FreeMemory == nil {
		c.FreeMemory = freeMemory
	}
	s := &Service{c: c, checkpoints: map[string]*checkpointSession{}, restores: map[string]*restoreSession{}}
	for _, d := range []string{c.Dir, s.dir(sideCheckpoint), s.dir(sideRestore)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
		if err := os.Chmod(d, 0o700); err != nil {
			return nil, err
		}
	}
	ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	// Versions do not change while the process runs, and asking starts programs.
	s.features = sync.OnceValues(func() (runtime.Features, error) { return c.Runtime.Features(ctx) })
	if err := s.recoverCheckpoints(ctx); err != nil {
		return nil, err
	}
	if err := s.recoverRestores(ctx); err != nil {
		return nil, err
	}
	s.background.Add(1)
	go func() {
		defer s.background.Done()
		s.collectLoop(ctx)
	}()
	return s, nil
}

// Close ends streams and background work. Sessions stay on disk, and what is
// frozen stays frozen.
func (s *Service) Close() error {
	s.stop()
	s.mu.Lock()
	for _, cs := range s.checkpoints {
		cs.cancel()
	}
	for _, rs := range s.restores {
		rs.end()
	}
	s.mu.Unlock()
	s.background.Wait()
	return nil
}

type side string

// One letter each: the path of a socket may have 107 bytes.
const (
	sideCheckpoint side = "c"
	sideRestore    side = "r"
)

func (s *Service) dir(sd side) string { return filepath.Join(s.c.Dir, string(sd)) }

// sessionDir is named by a hash: a session ID is the caller's and no file name.
func (s *Service) sessionDir(sd side, id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(s.dir(sd), hex.EncodeToString(sum[:12]))
}

const sessionFile = "session.json"

// save writes the record of a session so that it is there after a crash.
func save(dir string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, sessionFile+".new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, filepath.Join(dir, sessionFile))
	}
	if err != nil {
		return fmt.Errorf("record of the session: %w", err)
	}
	return nil
}

// load calls each for every recorded session of one side and removes directories
// without a valid record: nothing was frozen for them yet.
func (s *Service) load(ctx context.Context, sd side, each func(dir string, record []byte) error) error {
	entries, err := os.ReadDir(s.dir(sd))
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.dir(sd), e.Name())
		b, err := os.ReadFile(filepath.Join(dir, sessionFile))
		if err == nil {
			err = each(dir, b)
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) {
			log.G(ctx).WithError(err).WithField("dir", dir).Error("migration session can not be taken up, removing it")
		}
		if err := s.removeDir(dir); err != nil {
			return err
		}
	}
	return nil
}

func (s *Service) removeDir(dir string) error {
	if err := s.c.Scratch.Remove(filepath.Join(dir, scratchDir)); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

const scratchDir = "mem"

// collectLoop removes sessions whose containers are gone.
func (s *Service) collectLoop(ctx context.Context) {
	t := time.NewTicker(collectPeriod)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			s.collect(ctx)
		}
	}
}

func (s *Service) collect(ctx context.Context) {
	s.mu.Lock()
	var cs []*checkpointSession
	for _, c := range s.checkpoints {
		cs = append(cs, c)
	}
	var rs []*restoreSession
	for _, r := range s.restores {
		rs = append(rs, r)
	}
	s.mu.Unlock()
	for _, c := range cs {
		if c.expired(s.c.ConnectTimeout) || s.gone(ctx, c.containerIDs()) {
			log.G(ctx).WithField("session", c.ID).Info("collecting a checkpoint session that nobody finished")
			if err := s.endCheckpoint(ctx, c, migration.Outcome_OUTCOME_RESUME); err != nil {
				log.G(ctx).WithError(err).WithField("session", c.ID).Error("migration session can not be collected")
			}
		}
	}
	for _, r := range rs {
		if r.Sandbox != "" {
			if err := s.collectPod(ctx, r); err != nil {
				log.G(ctx).WithError(err).WithField("session", r.ID).Error("prepared pod can not be collected")
			}
			continue
		}
		if r.expired(s.c.ConnectTimeout) || s.gone(ctx, r.containerIDs()) {
			log.G(ctx).WithField("session", r.ID).Info("collecting a restore session that nobody finished")
			if err := s.endRestore(r); err != nil {
				log.G(ctx).WithError(err).WithField("session", r.ID).Error("migration session can not be collected")
			}
		}
	}
}

// gone tells whether none of the containers is known to the CRI service any more.
func (s *Service) gone(ctx context.Context, ids []string) bool {
	for _, id := range ids {
		if _, err := s.c.Containers.Get(ctx, id); !errdefs.IsNotFound(err) {
			return false
		}
	}
	return true
}

// Features implements migration.MigrationServiceServer.
func (s *Service) Features(ctx context.Context, _ *migration.FeaturesRequest) (*migration.FeaturesResponse, error) {
	f, err := s.features()
	if err != nil {
		return nil, toStatus(err)
	}
	return &migration.FeaturesResponse{
		StreamVersions:    []uint32{checkpoint.Version},
		RuntimeName:       s.c.RuntimeName,
		RuntimeVersion:    s.c.RuntimeVersion,
		OciRuntimeName:    f.OCIName,
		OciRuntimeVersion: f.OCIVersion,
		CriuVersion:       f.CRIUVersion,
		KernelRelease:     f.KernelRelease,
		Architecture:      f.Architecture,
		CpuFeatures:       f.CPUFeatures,
		Kernel: &migration.KernelFeatures{
			WriteTracking: f.WriteTracking,
			SoftDirty:     f.SoftDirty,
			LazyPages:     f.LazyPages,
			TimeNamespace: f.TimeNamespace,
		},
		CgroupMode: f.CgroupMode,
	}, nil
}

// toStatus gives an error of a lower layer its code.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	code := codes.Unknown
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		code = codes.DeadlineExceeded
	// A writer that gives up closes a stream whose answer it has not read.
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, checkpoint.ErrDigest), errors.Is(err, checkpoint.ErrFormat), errors.Is(err, checkpoint.ErrVersion), errors.Is(err, criu.ErrImage):
		code = codes.DataLoss
	case isNoSpace(err):
		code = codes.ResourceExhausted
	case errdefs.IsNotFound(err), errors.Is(err, runtime.ErrGone):
		code = codes.NotFound
	case errdefs.IsFailedPrecondition(err), errors.Is(err, criu.ErrConfinement):
		code = codes.FailedPrecondition
	}
	return status.Error(code, err.Error())
}

func invalid(format string, a ...any) error {
	return status.Errorf(codes.InvalidArgument, format, a...)
}

func precondition(format string, a ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, a...)
}

func checkSession(id string) error {
	if id == "" || len(id) > 256 {
		return invalid("a session needs a name of 1 to 256 bytes, this one has %d", len(id))
	}
	if strings.HasPrefix(id, podPrefix) {
		return invalid("names of sessions that begin with %s are taken", podPrefix)
	}
	return nil
}

// checkPrepare looks at what both requests that open a session have, and returns the
// request in the form in which it is remembered.
func checkPrepare(r interface {
	proto.Message
	GetSessionId() string
	GetOptions() map[string]string
	GetStreamVersion() uint32
	GetVolumes() []*migration.Volume
}) ([]byte, error) {
	if err := checkSession(r.GetSessionId()); err != nil {
		return nil, err
	}
	if err := checkOptions(r.GetOptions()); err != nil {
		return nil, err
	}
	if v := r.GetStreamVersion(); v != checkpoint.Version {
		return nil, invalid("stream version %d is not one of this runtime's: [%d]", v, checkpoint.Version)
	}
	if err := checkVolumes(r.GetVolumes()); err != nil {
		return nil, err
	}
	return marshal(r)
}

// checkOptions refuses every option: none is defined yet.
func checkOptions(o map[string]string) error {
	for k := range o {
		return invalid("unknown option %q", k)
	}
	return nil
}
