package migration

// Reason is a stable word for a step or an end of a migration. It is used as the
// reason of the condition Cloned and of events.
type Reason string

// Steps of a migration.
const (
	ReasonOpening    Reason = "Opening"
	ReasonPreparing  Reason = "Preparing"
	ReasonReceiving  Reason = "Receiving"
	ReasonFreezing   Reason = "Freezing"
	ReasonCommitting Reason = "Committing"
	ReasonRestoring  Reason = "Restoring"
	ReasonResuming   Reason = "ResumingAfterRestart"

	ReasonStreaming Reason = "MigrationStreaming"
	ReasonFrozen    Reason = "MigrationFrozen"
	ReasonGivenAway Reason = "MigrationGivenAway"
)

// Ends of a migration, and what is said while nobody answers.
const (
	// ReasonCloned: the clone runs with the state of the source.
	ReasonCloned Reason = "Cloned"
	// ReasonMigrated: the source was taken over by its clone.
	ReasonMigrated Reason = "Migrated"

	// ReasonDisabled: the gate is off on the target.
	ReasonDisabled Reason = "MigrationDisabled"
	// ReasonTargetUnfit: the target lacks something that the pod needs.
	ReasonTargetUnfit Reason = "TargetUnfit"
	// ReasonSourceRefused: the pod, its clone or its node cannot give it away.
	ReasonSourceRefused     Reason = "SourceRefused"
	ReasonSourceUnreachable Reason = "SourceUnreachable"
	ReasonSourceLost        Reason = "SourceLost"
	ReasonPrepareFailed     Reason = "PrepareFailed"
	ReasonStreamFailed      Reason = "StreamFailed"
	ReasonFreezeFailed      Reason = "FreezeFailed"
	ReasonVerifyFailed      Reason = "VerifyFailed"
	ReasonRestoreFailed     Reason = "RestoreFailed"
	ReasonJournalFailed     Reason = "JournalFailed"
	ReasonDeadlineExceeded  Reason = "DeadlineExceeded"
	ReasonCancelled         Reason = "Cancelled"
	// ReasonDryRun: it was only to be found out whether the pod can be moved, and it can.
	ReasonDryRun           Reason = "DryRun"
	ReasonKubeletRestarted Reason = "KubeletRestarted"
	ReasonRuntimeRestarted Reason = "RuntimeRestarted"
	ReasonOwnershipRevoked Reason = "OwnershipRevoked"

	// ReasonAborted: the source runs on, the migration ended before the commit.
	ReasonAborted Reason = "MigrationAborted"
	// ReasonReturned: the source runs on, the target could not restore.
	ReasonReturned Reason = "MigrationReturned"
	// ReasonTargetUnreachable: the source stays frozen because nobody says what
	// became of the clone.
	ReasonTargetUnreachable Reason = "MigrationTargetUnreachable"
	// ReasonRetrying: something has to succeed and did not yet.
	ReasonRetrying Reason = "MigrationRetrying"
)
