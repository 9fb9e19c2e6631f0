package v1alpha1

// ConditionCloned is the condition of a clone pod. Its status is Unknown while the
// migration runs (the reason tells how far it is), True when the clone runs with the
// state of its source, and False when it does not and never will.
const ConditionCloned = "Cloned"

// ConditionDisruptionTarget is Kubernetes' own condition, which a source pod gets
// with ReasonMigrated, so that controllers know that it did not fail by itself.
const ConditionDisruptionTarget = "DisruptionTarget"

// Reasons of ConditionCloned while its status is Unknown.
const (
	ReasonOpening              = "Opening"
	ReasonPreparing            = "Preparing"
	ReasonReceiving            = "Receiving"
	ReasonFreezing             = "Freezing"
	ReasonCommitting           = "Committing"
	ReasonRestoring            = "Restoring"
	ReasonResumingAfterRestart = "ResumingAfterRestart"
)

// ReasonCloned is the reason of ConditionCloned when its status is True.
const ReasonCloned = "Cloned"

// Reasons of ConditionCloned when its status is False.
const (
	ReasonMigrationDisabled = "MigrationDisabled"
	ReasonTargetUnfit       = "TargetUnfit"
	ReasonSourceRefused     = "SourceRefused"
	ReasonSourceUnreachable = "SourceUnreachable"
	ReasonSourceLost        = "SourceLost"
	ReasonPrepareFailed     = "PrepareFailed"
	ReasonStreamFailed      = "StreamFailed"
	ReasonFreezeFailed      = "FreezeFailed"
	ReasonVerifyFailed      = "VerifyFailed"
	ReasonRestoreFailed     = "RestoreFailed"
	ReasonJournalFailed     = "JournalFailed"
	ReasonDeadlineExceeded  = "DeadlineExceeded"
	ReasonCancelled         = "Cancelled"
	ReasonDryRun            = "DryRun"
	ReasonKubeletRestarted  = "KubeletRestarted"
	ReasonRuntimeRestarted  = "RuntimeRestarted"
	ReasonOwnershipRevoked  = "OwnershipRevoked"
)

// ReasonMigrated is the reason of a source pod's status, of its DisruptionTarget
// condition, and of the event that says so.
const ReasonMigrated = "Migrated"

// Reasons of events on the source pod.
const (
	EventStreaming         = "MigrationStreaming"
	EventFrozen            = "MigrationFrozen"
	EventGivenAway         = "MigrationGivenAway"
	EventAborted           = "MigrationAborted"
	EventReturned          = "MigrationReturned"
	EventTargetUnreachable = "MigrationTargetUnreachable"
	EventRetrying          = "MigrationRetrying"
)
