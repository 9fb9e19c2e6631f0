package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// PodMigration moves a running pod to another node: a new pod takes over its processes.
// One object is one migration; it stays as a record when it is over. Deleting one that
// is not over cancels it, and the pod goes on running where it is.
//
// Whoever may create these objects in a namespace may have its pods moved; the clone has
// the spec of its source, so nobody gets to see more than before.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=pm;pmig,categories=podmig
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.spec.podName`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Source",type=string,JSONPath=`.status.sourceNode`
// +kubebuilder:printcolumn:name="Target",type=string,JSONPath=`.status.targetNode`
// +kubebuilder:printcolumn:name="Clone",type=string,JSONPath=`.status.clonePodName`
// +kubebuilder:printcolumn:name="Bytes",type=integer,priority=1,JSONPath=`.status.transferredBytes`
// +kubebuilder:printcolumn:name="Frozen-ms",type=integer,priority=1,JSONPath=`.status.frozenMilliseconds`
// +kubebuilder:printcolumn:name="Reason",type=string,priority=1,JSONPath=`.status.reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type PodMigration struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec PodMigrationSpec `json:"spec"`
	// +optional
	Status PodMigrationStatus `json:"status,omitempty"`
}

// PodMigrationSpec says which pod moves, and where to.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a migration does not change: delete it to cancel it, and make another"
// +kubebuilder:validation:XValidation:rule="!has(self.targetNode) || !has(self.nodeSelector)",message="give targetNode or nodeSelector, not both"
type PodMigrationSpec struct {
	// PodName is a running pod of the same namespace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	PodName string `json:"podName"`
	// TargetNode is where the pod has to run afterwards; empty for any node but its own.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	TargetNode string `json:"targetNode,omitempty"`
	// NodeSelector has labels that the target must have, beside what the pod itself asks for.
	// +optional
	// +kubebuilder:validation:MinProperties=1
	// +kubebuilder:validation:MaxProperties=32
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// TimeoutSeconds is how long the migration may take from the creation of the clone on.
	// After that the clone is deleted, and the source runs on unless it was given away.
	// +optional
	// +kubebuilder:default=600
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=86400
	TimeoutSeconds int32 `json:"timeoutSeconds,omitempty"`
	// FreezeBudgetMilliseconds is for how long the pod may stand still until the memory that it
	// has written since it was sent last has been sent again. A pod that writes so much that it
	// would take longer is not frozen: the migration is rolled back. Without it, it takes as long as
	// it takes. What else a freeze costs (saving and restoring processes, files) is not part of it.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=600000
	FreezeBudgetMilliseconds *int32 `json:"freezeBudgetMilliseconds,omitempty"`
	// OnFailure is what becomes of the pod if it cannot be moved and was not lost: RunOn leaves it
	// where it is, Evict evicts it, as its disruption budgets allow, so that its owner starts
	// another one.
	// +optional
	// +kubebuilder:default=RunOn
	OnFailure OnFailure `json:"onFailure,omitempty"`
	// DryRun only finds out whether the pod can be moved now, with everything that is checked
	// before a freeze: the clone is scheduled, the two kubelets compare, the runtime looks at the
	// processes. The migration ends Succeeded with the reason DryRun and a message, or Refused.
	// +optional
	DryRun bool `json:"dryRun,omitempty"`
	// TTLSecondsAfterFinished is when a migration that is over is deleted; without it, it stays.
	// +optional
	// +kubebuilder:validation:Minimum=0
	TTLSecondsAfterFinished *int32 `json:"ttlSecondsAfterFinished,omitempty"`
	// Priority orders those that wait because of a limit, highest first.
	// +optional
	// +kubebuilder:validation:Minimum=-1000
	// +kubebuilder:validation:Maximum=1000
	Priority int32 `json:"priority,omitempty"`
}

// OnFailure is what becomes of a pod that could not be moved.
//
// +kubebuilder:validation:Enum=RunOn;Evict
type OnFailure string

// What can become of it.
const (
	// FailureRunOn leaves the pod alone.
	FailureRunOn OnFailure = "RunOn"
	// FailureEvict evicts the pod.
	FailureEvict OnFailure = "Evict"
)

// Phase is how far a migration is.
//
// +kubebuilder:validation:Enum=Pending;Scheduling;Preparing;Transferring;Freezing;Restoring;Succeeded;Refused;RolledBack;Failed;Cancelled
type Phase string

// The phases. The first ones follow each other; the others are ends.
const (
	// PhasePending: it waits for its turn.
	PhasePending Phase = "Pending"
	// PhaseScheduling: the clone exists and is on no node yet.
	PhaseScheduling Phase = "Scheduling"
	// PhasePreparing: the two nodes compare the pods, and the target makes its containers.
	PhasePreparing Phase = "Preparing"
	// PhaseTransferring: memory is sent while the pod runs.
	PhaseTransferring Phase = "Transferring"
	// PhaseFreezing: the pod stands still.
	PhaseFreezing Phase = "Freezing"
	// PhaseRestoring: the target owns the pod and brings its processes up.
	PhaseRestoring Phase = "Restoring"

	// PhaseSucceeded: the clone runs with the state of the source.
	PhaseSucceeded Phase = "Succeeded"
	// PhaseRefused: the pod was never frozen; the reason names what is in the way.
	PhaseRefused Phase = "Refused"
	// PhaseRolledBack: it went wrong after the freeze had begun; the source runs on.
	PhaseRolledBack Phase = "RolledBack"
	// PhaseFailed: neither source nor clone runs.
	PhaseFailed Phase = "Failed"
	// PhaseCancelled: somebody deleted the clone or the migration; the source runs on.
	PhaseCancelled Phase = "Cancelled"
)

// Over tells whether a phase is an end.
func (p Phase) Over() bool {
	switch p {
	case PhaseSucceeded, PhaseRefused, PhaseRolledBack, PhaseFailed, PhaseCancelled:
		return true
	}
	return false
}

// PhaseTransition is when a phase began.
type PhaseTransition struct {
	Phase Phase            `json:"phase"`
	Time  metav1.MicroTime `json:"time"`
}

// PodMigrationStatus says how far a migration is and how it ended.
type PodMigrationStatus struct {
	// +optional
	Phase Phase `json:"phase,omitempty"`
	// PhaseTransitions are the phases that were seen, in order.
	// +optional
	// +listType=atomic
	PhaseTransitions []PhaseTransition `json:"phaseTransitions,omitempty"`
	// Reason is one word for why, one of the clone's condition Cloned where it has one.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message is a sentence that names cause and cure.
	// +optional
	Message string `json:"message,omitempty"`
	// SourcePodUID tells the pod that moves from later ones of the same name.
	// +optional
	SourcePodUID types.UID `json:"sourcePodUID,omitempty"`
	// +optional
	SourceNode string `json:"sourceNode,omitempty"`
	// ClonePodName is the pod that takes over.
	// +optional
	ClonePodName string `json:"clonePodName,omitempty"`
	// +optional
	ClonePodUID types.UID `json:"clonePodUID,omitempty"`
	// TargetNode is where the clone is.
	// +optional
	TargetNode string `json:"targetNode,omitempty"`
	// TransferredBytes of the checkpoint have reached the target.
	// +optional
	TransferredBytes int64 `json:"transferredBytes,omitempty"`
	// ExpectedFreezeMilliseconds is for how long the pod would stand still, if it were frozen now, until
	// the memory is sent that it has written since it was sent last. What else a freeze costs is not
	// in it; see freezeBudgetMilliseconds.
	// +optional
	ExpectedFreezeMilliseconds *int64 `json:"expectedFreezeMilliseconds,omitempty"`
	// FrozenMilliseconds is for how long the pod stood still; missing if a kubelet restarted
	// meanwhile. Clients wait about so long, and until they are told of the new address.
	// +optional
	FrozenMilliseconds *int64 `json:"frozenMilliseconds,omitempty"`
}

// PodMigrationList is a list of migrations.
//
// +kubebuilder:object:root=true
type PodMigrationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []PodMigration `json:"items"`
}

// LabelMigration is on every clone that a migration has made, with the migration's UID.
const LabelMigration = "podmig.dev/migration"

// AnnotationOrigin is on such clones, with the name of the pod that was moved first: the
// names of clones are made from it, however often they move.
const AnnotationOrigin = "podmig.dev/origin"

// AnnotationSource is on such clones, with the name of the pod that they take over.
const AnnotationSource = "podmig.dev/source"

// LabelSourceUID is on migrations that were made because a pod is being deleted, with that
// pod's UID.
const LabelSourceUID = "podmig.dev/source-uid"

// AnnotationCancel, set on a clone with any value, asks its kubelet to give up the
// migration. Before the source is given away the kubelet does, and the source runs on;
// afterwards the clone goes on as if nothing had been asked. (A deletion ends the pod.)
const AnnotationCancel = "podmig.dev/cancel"

// AnnotationDryRun, on a clone with any value, asks its kubelet to end the migration before
// anything is done: with the reason DryRun if the pod could be moved.
const AnnotationDryRun = "podmig.dev/dry-run"

// AnnotationFreezeBudget, on a clone, is for how many milliseconds its source may stand still
// until what it has written in the last round is sent.
const AnnotationFreezeBudget = "podmig.dev/freeze-budget-milliseconds"

// ConditionTransfer of a clone has in its message how much was moved, as KEY=NUMBER
// separated by spaces.
const (
	ConditionTransfer = "podmig.dev/Transfer"
	// TransferBytes have arrived so far.
	TransferBytes = "bytes"
	// TransferExpected is for how many milliseconds the pod would stand still, if it were frozen now, until
	// the memory that it has written since the last round is sent.
	TransferExpected = "expectedFreezeMilliseconds"
	// TransferFrozen is for how many milliseconds the pod stood still, from the request to freeze
	// to the resumed clone.
	TransferFrozen = "frozenMilliseconds"
)

// FinalizerCancel is on migrations that run: a deletion waits until the clone is gone.
const FinalizerCancel = "podmig.dev/cancel"

// Reasons of migrations that no clone's condition has.
const (
	// MigrationQueued: limits let no more migrations run, or another moves this pod.
	MigrationQueued = "Queued"
	// MigrationUnfitPod: the pod is not one that can be moved.
	MigrationUnfitPod = "UnfitPod"
	// MigrationCloneRefused: the API server did not take the clone.
	MigrationCloneRefused = "CloneRefused"
	// MigrationTimedOut: it took longer than it may.
	MigrationTimedOut = "TimedOut"
	// MigrationCloneGone: somebody deleted the clone.
	MigrationCloneGone = "CloneGone"
)
