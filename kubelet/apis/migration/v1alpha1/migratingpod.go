package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// MigratingPod keeps one pod running and moves it where others would be deleted: when its
// pod is deleted or evicted, a clone on another node takes over its processes. Deleting the
// MigratingPod deletes its pods.
//
// The pods are called NAME-0, NAME-1 and so on; each move and each start from the template
// takes the next number.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=mp;mpod,categories=podmig
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.state`
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.status.activePod`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.status.nodeName`
// +kubebuilder:printcolumn:name="Moves",type=integer,JSONPath=`.status.moves`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
//
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 240",message="the name must leave room for the numbers of its pods: at most 240 characters"
type MigratingPod struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec MigratingPodSpec `json:"spec"`
	// +optional
	Status MigratingPodStatus `json:"status,omitempty"`
}

// MigratingPodSpec says what runs.
type MigratingPodSpec struct {
	// Template is the pod. A change is used when the pod is started from it again, not by the
	// pod that runs: a clone is the same as its source.
	//
	// +kubebuilder:validation:XValidation:rule="!has(self.spec.restartPolicy) || self.spec.restartPolicy == 'Always'",message="the restart policy must be Always: a MigratingPod keeps its pod running"
	// +kubebuilder:validation:XValidation:rule="!has(self.spec.terminationGracePeriodSeconds) || self.spec.terminationGracePeriodSeconds > 0",message="with a termination grace period of 0 every deletion is a forced one, which moves nothing"
	Template corev1.PodTemplateSpec `json:"template"`
	// NodeSelector has labels that nodes of its pods must have, beside what the template asks
	// for. A change is used by the next move.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// +optional
	Strategy MigratingPodStrategy `json:"strategy,omitempty"`
}

// MigratingPodStrategy says how pods move.
type MigratingPodStrategy struct {
	// DeadlineSeconds is for how long after its deletion a pod waits to be moved, however
	// often that is tried. After that it ends, and another is started from the template.
	// +optional
	// +kubebuilder:default=600
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=86400
	DeadlineSeconds *int32 `json:"deadlineSeconds,omitempty"`
	// Priority is that of its migrations.
	// +optional
	// +kubebuilder:validation:Minimum=-1000
	// +kubebuilder:validation:Maximum=1000
	Priority int32 `json:"priority,omitempty"`
}

// MigratingPodState is what a MigratingPod does.
//
// +kubebuilder:validation:Enum=Creating;Running;MigrationPending;Migrating;Invalid
type MigratingPodState string

// The states.
const (
	// StateCreating: a pod starts from the template.
	StateCreating MigratingPodState = "Creating"
	// StateRunning: the active pod runs and stays where it is.
	StateRunning MigratingPodState = "Running"
	// StateMigrationPending: the active pod is to move and has no clone yet.
	StateMigrationPending MigratingPodState = "MigrationPending"
	// StateMigrating: a clone is about to take over.
	StateMigrating MigratingPodState = "Migrating"
	// StateInvalid: it needs somebody to look; the message says what is wrong.
	StateInvalid MigratingPodState = "Invalid"
)

// MigratingPodStatus says what is observed.
type MigratingPodStatus struct {
	// +optional
	State MigratingPodState `json:"state,omitempty"`
	// ActivePod is the pod that counts: the source until its clone has taken over.
	// +optional
	ActivePod string `json:"activePod,omitempty"`
	// NodeName is where the active pod is.
	// +optional
	NodeName string `json:"nodeName,omitempty"`
	// Moves is how often the pod was taken over by another one.
	// +optional
	Moves int32 `json:"moves,omitempty"`
	// Message is a sentence about the state, if there is something to say.
	// +optional
	Message string `json:"message,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// ObservedGeneration is that of the spec which the rest was made from.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
}

// Conditions of a MigratingPod.
const (
	// ConditionReady is true while the active pod is ready.
	ConditionReady = "Ready"
	// ConditionColdStarted is true if the active pod was started from the template although
	// another one had run before: what that one had in memory is gone. The reason says why.
	ConditionColdStarted = "ColdStarted"
)

// MigratingPodList is a list of them.
//
// +kubebuilder:object:root=true
type MigratingPodList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MigratingPod `json:"items"`
}
