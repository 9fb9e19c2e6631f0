package migration

// TargetState is where a target stands.
type TargetState string

const (
	TargetFresh       TargetState = "Fresh"
	TargetOpening     TargetState = "Opening"
	TargetPreparing   TargetState = "Preparing"
	TargetArming      TargetState = "Arming"
	TargetReceiving   TargetState = "Receiving"
	TargetFreezeAsked TargetState = "FreezeAsked"
	TargetCommitting  TargetState = "Committing"
	TargetRestoring   TargetState = "Restoring"
	TargetRunning     TargetState = "Running"
	TargetInspecting  TargetState = "Inspecting"
	TargetAborting    TargetState = "Aborting"
	TargetFailing     TargetState = "Failing"

	// Terminal states.
	TargetDone   TargetState = "Done"
	TargetFailed TargetState = "Failed"
)

var recordedTarget = map[TargetState]bool{
	TargetArming: true, TargetCommitting: true, TargetRestoring: true,
	TargetRunning: true, TargetAborting: true, TargetFailing: true,
}

// Target is the machine of the node that takes a pod over.
type Target struct {
	id    Identity
	dl    Deadlines
	state TargetState
}

// NewTarget returns a machine that waits for its Begun.
func NewTarget(id Identity, dl Deadlines) *Target {
	return &Target{id: id, dl: dl.withDefaults(), state: TargetFresh}
}

// LoadTarget returns the machine of a record; its first event is Restarted.
func LoadTarget(r Record, dl Deadlines) (*Target, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return &Target{id: r.Identity, dl: dl.withDefaults(), state: TargetState(r.State)}, nil
}

// Step takes one event and returns what to do.
func (t *Target) Step(e Event) ([]Effect, error) { return nil, ErrUnlisted }

// State is where the machine stands.
func (t *Target) State() TargetState { return t.state }

// Identity says which migration this is.
func (t *Target) Identity() Identity { return t.id }

// Outcome is what the source's kubelet is told when it asks.
func (t *Target) Outcome() (Outcome, Reason, string) { return OutcomePending, "", "" }

// Terminal reports whether the machine has nothing left to do.
func (t *Target) Terminal() bool { return t.state == TargetDone || t.state == TargetFailed }
