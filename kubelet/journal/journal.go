// Package journal keeps the records of running migrations on disk, so that a
// restarted kubelet knows which pods it has given away, taken over or has to thaw.
//
// There is one file per session and side. A record is replaced as a whole or not at
// all, and Put and Delete return only when a power loss cannot undo them. What
// cannot be read is reported with the file's name and never removed or skipped: a
// forgotten record could let a pod run twice.
//
// The tests show this against a file system that fails and loses power at every
// step. They cannot show that a disk keeps what it promises.
package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"podmig.dev/podmig/kubelet/migration"
)

const (
	// format is the version of the envelope around a record.
	format = 1
	// maxSize bounds a file; a record has some kilobytes.
	maxSize = 1 << 20
	// reserve is kept on the disk so that the end of a migration can be written when
	// the disk is full: a source that cannot write stays frozen.
	reserveName = ".reserve"
	reserveSize = 64 << 10
	tempPrefix  = ".tmp-"
	suffix      = ".json"
)

// ErrUncertain is wrapped by errors after which the old or the new record may be
// found after a crash. Every other error left the journal as it was.
var ErrUncertain = errors.New("the journal may or may not have changed")

// BadRecord is a file of the journal that cannot be used.
type BadRecord struct {
	Path string
	// Side and Session are what the file's name says; empty if it says nothing.
	Side    migration.Side
	Session string
	Err     error
}

func (b *BadRecord) Error() string {
	return fmt.Sprintf("migration record %s: %s; the pod it stands for must not be touched before it is known where its "+
		"processes run: look at both pods of the migration, then move the file away and restart the kubelet", b.Path, b.Err)
}

func (b *BadRecord) Unwrap() error { return b.Err }

// envelope is the content of a file.
type envelope struct {
	Format int    `json:"format"`
	SHA256 string `json:"sha256"`
	// Record is a migration.Record, kept as the bytes that the checksum is about.
	Record json.RawMessage `json:"record"`
}

// Journal is a directory of records. Its methods may be called concurrently. One
// process at a time may use a directory.
type Journal struct {
	dir string
	fs  fileSystem
	mu  sync.Mutex
}

// Open makes the directory if needed (mode 0700) and removes what crashed writes left behind.
func Open(dir string) (*Journal, error) { return open(dir, disk{}) }

func open(dir string, f fileSystem) (*Journal, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("migration journal %q: not an absolute path", dir)
	}
	if err := f.MakeDir(dir); err != nil {
		return nil, fmt.Errorf("migration journal: make directory %s: %w", dir, err)
	}
	j := &Journal{dir: dir, fs: f}
	names, err := f.List(dir)
	if err != nil {
		return nil, fmt.Errorf("migration journal: list %s: %w", dir, err)
	}
	for _, n := range names {
		if strings.HasPrefix(n, tempPrefix) {
			if err := f.Remove(filepath.Join(dir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("migration journal: remove unfinished %s: %w", n, err)
			}
		}
	}
	j.keepReserve(names)
	return j, nil
}

// Put writes or replaces the record of its session and side.
func (j *Journal) Put(r migration.Record) error {
	if err := r.Validate(); err != nil {
		return err
	}
	name, err := fileName(r.Side, r.Identity.Session)
	if err != nil {
		return err
	}
	content, err := encode(r)
	if err != nil {
		return fmt.Errorf("migration record %s: %w", name, err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	err = j.replace(name, content)
	if errors.Is(err, syscall.ENOSPC) && !errors.Is(err, ErrUncertain) {
		if rmErr := j.fs.Remove(filepath.Join(j.dir, reserveName)); rmErr == nil {
			err = j.replace(name, content)
		}
	}
	if err != nil {
		return fmt.Errorf("write migration record %s: %w", filepath.Join(j.dir, name), err)
	}
	return nil
}

// replace puts content in place of a file, or leaves the file as it was.
func (j *Journal) replace(name string, content []byte) error {
	temp := filepath.Join(j.dir, tempPrefix+name)
	if err := j.fs.WriteSync(temp, content); err != nil {
		_ = j.fs.Remove(temp) // Open removes it otherwise.
		return err
	}
	if err := j.fs.Rename(temp, filepath.Join(j.dir, name)); err != nil {
		_ = j.fs.Remove(temp)
		return err
	}
	if err := j.fs.SyncDir(j.dir); err != nil {
		return fmt.Errorf("%w: %w", ErrUncertain, err)
	}
	return nil
}

// Delete removes a record; one that does not exist is no error.
func (j *Journal) Delete(side migration.Side, session string) error {
	name, err := fileName(side, session)
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	path := filepath.Join(j.dir, name)
	if err := j.fs.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete migration record %s: %w", path, err)
	}
	// Also when it did not exist: an earlier Delete may have failed right here.
	if err := j.fs.SyncDir(j.dir); err != nil {
		return fmt.Errorf("delete migration record %s: %w: %w", path, ErrUncertain, err)
	}
	if names, err := j.fs.List(j.dir); err == nil {
		j.keepReserve(names)
	}
	return nil
}

// keepReserve puts the reserve back. It is a help in need and no duty.
func (j *Journal) keepReserve(names []string) {
	for _, n := range names {
		if n == reserveName {
			return
		}
	}
	path := filepath.Join(j.dir, reserveName)
	if err := j.fs.WriteSync(path, bytes.Repeat([]byte{'.'}, reserveSize)); err != nil {
		_ = j.fs.Remove(path)
	}
}

// List returns all records that can be read, ordered by name, and joins one
// *BadRecord per file that cannot.
func (j *Journal) List() ([]migration.Record, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	names, err := j.fs.List(j.dir)
	if err != nil {
		return nil, fmt.Errorf("migration journal: list %s: %w", j.dir, err)
	}
	var records []migration.Record
	var bad []error
	for _, n := range names {
		if n == reserveName || strings.HasPrefix(n, tempPrefix) {
			continue
		}
		side, session := parseName(n)
		path := filepath.Join(j.dir, n)
		r, err := j.read(path, side, session)
		if err != nil {
			bad = append(bad, &BadRecord{Path: path, Side: side, Session: session, Err: err})
			continue
		}
		records = append(records, r)
	}
	return records, errors.Join(bad...)
}

func (j *Journal) read(path string, side migration.Side, session string) (migration.Record, error) {
	if side == "" {
		return migration.Record{}, errors.New("the name is not that of a record")
	}
	content, err := j.fs.Read(path, maxSize)
	if err != nil {
		return migration.Record{}, err
	}
	r, err := decode(content)
	if err != nil {
		return migration.Record{}, err
	}
	if r.Side != side || r.Identity.Session != session {
		return migration.Record{}, fmt.Errorf("the record is of the %s of session %q, not what the name says", r.Side, r.Identity.Session)
	}
	return r, nil
}

func encode(r migration.Record) ([]byte, error) {
	rec, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	out, err := json.Marshal(envelope{Format: format, SHA256: checksum(rec), Record: rec})
	if err != nil {
		return nil, err
	}
	if len(out) > maxSize {
		return nil, fmt.Errorf("%d bytes are more than a record may have (%d)", len(out), maxSize)
	}
	return append(out, '\n'), nil
}

func decode(content []byte) (migration.Record, error) {
	var e envelope
	if err := strict(content, &e); err != nil {
		return migration.Record{}, fmt.Errorf("not a record: %w", err)
	}
	if e.Format != format {
		return migration.Record{}, fmt.Errorf("format %d, this kubelet reads format %d", e.Format, format)
	}
	if checksum(e.Record) != e.SHA256 {
		return migration.Record{}, errors.New("the checksum does not fit, the file is damaged")
	}
	var head struct{ Version int }
	if err := json.Unmarshal(e.Record, &head); err != nil {
		return migration.Record{}, fmt.Errorf("not a record: %w", err)
	}
	if head.Version != migration.RecordVersion {
		return migration.Record{}, fmt.Errorf("version %d, this kubelet reads version %d", head.Version, migration.RecordVersion)
	}
	var r migration.Record
	if err := strict(e.Record, &r); err != nil {
		return migration.Record{}, fmt.Errorf("not a record: %w", err)
	}
	return r, r.Validate()
}

func checksum(rec []byte) string {
	sum := sha256.Sum256(rec)
	return hex.EncodeToString(sum[:])
}

func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.More() {
		return errors.New("something follows")
	}
	return nil
}

// fileName is "source-<session>.json". A session must not be able to leave the directory.
func fileName(side migration.Side, session string) (string, error) {
	if side != migration.SideSource && side != migration.SideTarget {
		return "", fmt.Errorf("migration record: side %q is unknown", side)
	}
	if !validSession(session) {
		return "", fmt.Errorf("migration record: session %q is not a UID", session)
	}
	return string(side) + "-" + session + suffix, nil
}

func parseName(name string) (migration.Side, string) {
	base, ok := strings.CutSuffix(name, suffix)
	side, session, found := strings.Cut(base, "-")
	if !ok || !found || !validSession(session) {
		return "", ""
	}
	if s := migration.Side(side); s == migration.SideSource || s == migration.SideTarget {
		return s, session
	}
	return "", ""
}

func validSession(s string) bool {
	return len(s) > 0 && len(s) <= 128 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") == ""
}
