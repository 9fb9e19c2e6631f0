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
	"errors"

	"podmig.dev/podmig/kubelet/migration"
)

// ErrUncertain is wrapped by errors after which the old or the new record may be
// found after a crash. Every other error left the journal as it was.
var ErrUncertain = errors.New("the journal may or may not have changed")

// Journal is a directory of records. Its methods may be called concurrently.
type Journal struct{ dir string }

// Open makes the directory if needed (mode 0700) and removes what crashed writes left behind.
func Open(dir string) (*Journal, error) { return nil, errors.New("not ready") }

// Put writes or replaces the record of its session and side.
func (j *Journal) Put(r migration.Record) error { return errors.New("not ready") }

// Delete removes a record; one that does not exist is no error.
func (j *Journal) Delete(side migration.Side, session string) error { return errors.New("not ready") }

// List returns all records that can be read, ordered by name, and joins one
// *BadRecord per file that cannot.
func (j *Journal) List() ([]migration.Record, error) { return nil, errors.New("not ready") }

// BadRecord is a file of the journal that cannot be used.
type BadRecord struct {
	Path string
	// Side and Session are what the file's name says; empty if it says nothing.
	Side    migration.Side
	Session string
	Err     error
}

func (b *BadRecord) Error() string { return b.Path }
func (b *BadRecord) Unwrap() error { return b.Err }
