package migration

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// RecordVersion is the version of Record that this package writes.
const RecordVersion = 1

// Side says which end of a migration a machine or a record stands for.
type Side string

const (
	SideSource Side = "source"
	SideTarget Side = "target"
)

// Container pairs a container's name in the pod with its ID in the runtime.
type Container struct {
	Name string `json:"name"`
	ID   string `json:"id"`
}

// Identity says which migration a machine belongs to and what a kubelet needs to
// finish it after a restart. It never changes, apart from the containers and the
// sandbox, which the target learns when it has created them.
type Identity struct {
	// Session is the UID of the clone pod.
	Session   string `json:"session"`
	Namespace string `json:"namespace"`
	SourcePod string `json:"sourcePod"`
	SourceUID string `json:"sourceUID"`
	ClonePod  string `json:"clonePod"`
	// PeerNode is the node of the other side.
	PeerNode string `json:"peerNode"`
	// PeerAddress is where its kubelet was found when the migration began, host and port;
	// empty if it was not.
	PeerAddress string `json:"peerAddress,omitempty"`
	// SandboxID and Containers are those of this side.
	SandboxID  string      `json:"sandboxID,omitempty"`
	Containers []Container `json:"containers,omitempty"`
	// Data belongs to the caller; the engine carries it and does not look inside.
	Data json.RawMessage `json:"data,omitempty"`
}

// Record is what a machine needs to survive a restart of its kubelet.
type Record struct {
	Version  int      `json:"version"`
	Side     Side     `json:"side"`
	Identity Identity `json:"identity"`
	// State is a SourceState or a TargetState.
	State string `json:"state"`
	// Reason and Message tell why, for states that lead to an end.
	Reason  Reason `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	// Tell says that the other side still has to hear of the failure.
	Tell bool `json:"tell,omitempty"`
}

// ErrRecord is wrapped by every error about a record that cannot be used.
var ErrRecord = errors.New("unusable migration record")

// Validate reports what makes a record unusable.
func (r Record) Validate() error {
	switch {
	case r.Version != RecordVersion:
		return fmt.Errorf("%w: version %d, this kubelet reads version %d", ErrRecord, r.Version, RecordVersion)
	case r.Side != SideSource && r.Side != SideTarget:
		return fmt.Errorf("%w: side %q is neither %q nor %q", ErrRecord, r.Side, SideSource, SideTarget)
	case r.Identity.Session == "":
		return fmt.Errorf("%w: no session", ErrRecord)
	case r.Side == SideSource && !recordedSource[SourceState(r.State)]:
		return fmt.Errorf("%w: a source never records state %q", ErrRecord, r.State)
	case r.Side == SideTarget && !recordedTarget[TargetState(r.State)]:
		return fmt.Errorf("%w: a target never records state %q", ErrRecord, r.State)
	}
	return nil
}

// Deadlines bounds every wait. The zero value of a field means its default.
type Deadlines struct {
	// Idle ends a source session that was opened and not used. A target that is
	// still preparing asks again every third of it.
	Idle time.Duration
	// Open bounds how long the target asks a source that does not answer.
	Open time.Duration
	// Prepare bounds how long the target takes to create the clone's containers.
	Prepare time.Duration
	// Stream bounds the time from the start of the stream to the freeze.
	Stream time.Duration
	// Freeze bounds how long a source stays frozen before it was committed.
	Freeze time.Duration
	// Commit is how long the target asks before it says that nobody answers; it goes
	// on asking.
	Commit time.Duration
	// Restore bounds the restore of all containers.
	Restore time.Duration
	// Outcome is how long a source that gave the pod away waits for "done" before
	// it asks, and how long it asks before it says that nobody answers.
	Outcome time.Duration
	// Abort bounds how long a target tells its source that it gave up before the
	// commit; the source's own deadlines do the rest.
	Abort time.Duration
	// Retry is the first pause before something that did not work is tried again. It
	// doubles up to RetryMax.
	Retry    time.Duration
	RetryMax time.Duration
}

// DefaultDeadlines suit a cluster network and pods of some gigabytes.
var DefaultDeadlines = Deadlines{
	Idle:     3 * time.Minute,
	Open:     time.Minute,
	Prepare:  15 * time.Minute,
	Stream:   30 * time.Minute,
	Freeze:   60 * time.Second,
	Commit:   30 * time.Second,
	Restore:  2 * time.Minute,
	Outcome:  30 * time.Second,
	Abort:    15 * time.Second,
	Retry:    250 * time.Millisecond,
	RetryMax: 10 * time.Second,
}

func (d Deadlines) withDefaults() Deadlines {
	def := DefaultDeadlines
	for _, f := range []struct{ v, def *time.Duration }{
		{&d.Idle, &def.Idle}, {&d.Open, &def.Open}, {&d.Prepare, &def.Prepare}, {&d.Stream, &def.Stream},
		{&d.Freeze, &def.Freeze}, {&d.Commit, &def.Commit}, {&d.Restore, &def.Restore},
		{&d.Outcome, &def.Outcome}, {&d.Abort, &def.Abort}, {&d.Retry, &def.Retry},
		{&d.RetryMax, &def.RetryMax},
	} {
		if *f.v <= 0 {
			*f.v = *f.def
		}
	}
	return d
}
