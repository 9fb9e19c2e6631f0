package wire

// Content types, headers and trailers.
const (
	ContentJSON   = "application/json"
	ContentStream = "application/vnd.podmig.checkpoint"

	// HeaderStreamVersion is the version of the checkpoint stream.
	HeaderStreamVersion = "Podmig-Stream-Version"
	// TrailerStreamBytes follows a complete stream: its length in bytes.
	TrailerStreamBytes = "Podmig-Stream-Bytes"
)

// Limits.
const (
	// MaxBody bounds every JSON body in both directions.
	MaxBody = 1 << 20
	// MaxDepth bounds the nesting of a body.
	MaxDepth = 8
	// MaxItems bounds every list in a body.
	MaxItems = 1024
	// MaxText bounds every string in a body.
	MaxText = 16 << 10
)

// Features is what a node can do; see FeaturesResponse of the CRI extension.
type Features struct {
	// StreamVersions are those the runtime reads and writes, best first.
	StreamVersions    []uint32 `json:"streamVersions"`
	RuntimeName       string   `json:"runtimeName"`
	RuntimeVersion    string   `json:"runtimeVersion"`
	OCIRuntimeName    string   `json:"ociRuntimeName,omitempty"`
	OCIRuntimeVersion string   `json:"ociRuntimeVersion,omitempty"`
	CRIUVersion       string   `json:"criuVersion"`
	KernelRelease     string   `json:"kernelRelease"`
	Architecture      string   `json:"architecture"`
	CPUFeatures       []string `json:"cpuFeatures,omitempty"`
	CgroupMode        string   `json:"cgroupMode,omitempty"`
	WriteTracking     bool     `json:"writeTracking,omitempty"`
	SoftDirty         bool     `json:"softDirty,omitempty"`
	LazyPages         bool     `json:"lazyPages,omitempty"`
	TimeNamespace     bool     `json:"timeNamespace,omitempty"`
}

// Severity of a finding.
type Severity string

const (
	SeverityWarning  Severity = "warning"
	SeverityBlocking Severity = "blocking"
)

// Finding is one thing in the way of a migration.
type Finding struct {
	Severity Severity `json:"severity"`
	// Code is stable, for example "IOUring".
	Code string `json:"code"`
	// Container is the name in the pod; empty if the finding is about the pod or the node.
	Container string `json:"container,omitempty"`
	PID       int32  `json:"pid,omitempty"`
	// FD is absent if the finding is not about a file descriptor.
	FD      *int32 `json:"fd,omitempty"`
	Message string `json:"message"`
	Cure    string `json:"cure,omitempty"`
}

// TargetContainer is a container of the clone as the open request states it.
type TargetContainer struct {
	Name string `json:"name"`
	// Image is the reference in the clone's spec.
	Image string `json:"image"`
	// ImageDigest is the digest that the target's runtime resolved it to; empty while
	// the image is not on the node.
	ImageDigest string `json:"imageDigest,omitempty"`
	// Sidecar marks a restartable init container.
	Sidecar bool `json:"sidecar,omitempty"`
	// Mounts are the mount paths, sorted: a process must find them where they were.
	Mounts []string `json:"mounts,omitempty"`
}

// Volume is a volume of a pod.
type Volume struct {
	Name string `json:"name"`
	// Kind is the field of the volume source, for example "emptyDir".
	Kind string `json:"kind"`
}

// OpenRequest is the body of open.
type OpenRequest struct {
	// Clone is the name of the clone pod; its UID is the session.
	Clone string `json:"clone"`
	// SourceUID is the UID of the source pod that the target has compared with.
	SourceUID string `json:"sourceUID"`
	// TargetNode is the node of the clone. It must be the caller.
	TargetNode string            `json:"targetNode"`
	Features   Features          `json:"features"`
	Containers []TargetContainer `json:"containers"`
	Volumes    []Volume          `json:"volumes,omitempty"`
	// MemoryAvailable on the target, bytes; 0 if it does not know.
	MemoryAvailable uint64 `json:"memoryAvailable,omitempty"`
}

// SourceContainer is a running container of the source.
type SourceContainer struct {
	Name        string `json:"name"`
	Image       string `json:"image"`
	ImageDigest string `json:"imageDigest"`
	Sidecar     bool   `json:"sidecar,omitempty"`
	// RestartCount and StartedAt (nanoseconds since 1970) carry on in the clone.
	RestartCount int32 `json:"restartCount"`
	StartedAt    int64 `json:"startedAt"`
}

// OpenResponse is the answer to open.
type OpenResponse struct {
	// StreamVersion is the best that both runtimes have.
	StreamVersion uint32            `json:"streamVersion"`
	SourceNode    string            `json:"sourceNode"`
	Features      Features          `json:"features"`
	Containers    []SourceContainer `json:"containers"`
	Volumes       []Volume          `json:"volumes,omitempty"`
	// MemoryBytes is what the restore needs on the target.
	MemoryBytes uint64 `json:"memoryBytes"`
	RootfsBytes uint64 `json:"rootfsBytes"`
	// Findings are warnings; a blocking finding refuses the open.
	Findings []Finding `json:"findings,omitempty"`
}

// FreezeRequest is the body of freeze.
type FreezeRequest struct{}

// FreezeResponse is the answer to freeze: everything was handed to the stream.
type FreezeResponse struct {
	// FrozenAt is nanoseconds since 1970 by the source's clock.
	FrozenAt    int64  `json:"frozenAt"`
	StreamBytes uint64 `json:"streamBytes"`
	FinalBytes  uint64 `json:"finalBytes"`
	// Durations are in nanoseconds.
	FreezeDuration int64 `json:"freezeDuration"`
	DumpDuration   int64 `json:"dumpDuration"`
}

// CommitRequest is the body of commit.
type CommitRequest struct {
	// ManifestDigest is the SHA-256 of the manifest that the target has verified,
	// hexadecimal. Both sides log it.
	ManifestDigest string `json:"manifestDigest,omitempty"`
}

// CommitResponse is the answer to commit: the target owns the pod.
type CommitResponse struct{}

// DoneRequest is the body of done.
type DoneRequest struct {
	// ResumedAt is nanoseconds since 1970 by the target's clock; 0 after a restart.
	ResumedAt int64 `json:"resumedAt,omitempty"`
}

// FailureRequest is the body of failed and of abort.
type FailureRequest struct {
	// Reason is a word in CamelCase, Message a sentence; both reach the user.
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// Empty is the answer to done, failed and abort.
type Empty struct{}

// StatusResponse is the answer to status.
type StatusResponse struct {
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// Outcome of a migration on its target.
type Outcome string

const (
	OutcomePending  Outcome = "pending"
	OutcomeRestored Outcome = "restored"
	OutcomeFailed   Outcome = "failed"
	// OutcomeGone: this kubelet has neither the session nor a container of the clone.
	OutcomeGone Outcome = "gone"
)

// OutcomeResponse is the answer to outcome.
type OutcomeResponse struct {
	Outcome Outcome `json:"outcome"`
	Reason  string  `json:"reason,omitempty"`
	Message string  `json:"message,omitempty"`
}
