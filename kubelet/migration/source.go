package migration

import "errors"

// SourceState is where a source stands.
type SourceState string

const (
	SourceFresh     SourceState = "Fresh"
	SourceOpen      SourceState = "Open"
	SourcePreparing SourceState = "Preparing"
	SourceStreaming SourceState = "Streaming"
	SourceFreezing  SourceState = "Freezing"
	SourceFrozen    SourceState = "Frozen"
	SourceGiving    SourceState = "Giving"
	SourceGivenAway SourceState = "GivenAway"
	SourceReleasing SourceState = "Releasing"
	SourceReturning SourceState = "Returning"
	SourceAborting  SourceState = "Aborting"

	// Terminal states.
	SourceReleased SourceState = "Released"
	SourceReturned SourceState = "Returned"
	SourceAborted  SourceState = "Aborted"
)

var recordedSource = map[SourceState]bool{
	SourcePreparing: true, SourceGivenAway: true, SourceReleasing: true,
	SourceReturning: true, SourceAborting: true,
}

// ErrUnlisted is returned for a pair of state and event that no rule covers; the
// machine has not changed. It means a mistake in the caller.
var ErrUnlisted = errors.New("no rule for this event in this state")

// Source is the machine of the node that gives a pod away.
type Source struct {
	id    Identity
	dl    Deadlines
	state SourceState
}

// NewSource returns a machine that waits for its OpenRequested.
func NewSource(id Identity, dl Deadlines) *Source {
	return &Source{id: id, dl: dl.withDefaults(), state: SourceFresh}
}

// LoadSource returns the machine of a record; its first event is Restarted.
func LoadSource(r Record, dl Deadlines) (*Source, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return &Source{id: r.Identity, dl: dl.withDefaults(), state: SourceState(r.State)}, nil
}

// Step takes one event and returns what to do.
func (s *Source) Step(e Event) ([]Effect, error) { return nil, ErrUnlisted }

// State is where the machine stands.
func (s *Source) State() SourceState { return s.state }

// Identity says which migration this is.
func (s *Source) Identity() Identity { return s.id }

// Terminal reports whether the machine has nothing left to do.
func (s *Source) Terminal() bool {
	return s.state == SourceReleased || s.state == SourceReturned || s.state == SourceAborted
}
