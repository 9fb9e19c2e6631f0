package v1alpha1

// FinalizerMigrate, on a pod, makes a deletion wait until the pod has moved: its
// containers run on, it stays in the endpoints of Services, and its clone takes over.
// The wait ends when the finalizer is removed, by a deletion with a grace period of 0, and at
// the deadline.
const FinalizerMigrate = "podmig.dev/migrate"

// AnnotationDeadline, on a pod with FinalizerMigrate, is for how many seconds from the
// deletion on it waits to be moved, before it ends as any pod; 600 without it, 86400 at
// most, and 0 is not at all.
const AnnotationDeadline = "podmig.dev/migrate-deadline-seconds"

// Reasons of events on a pod whose deletion waits.
const (
	EventDeletionWaits    = "DeletionWaits"
	EventDeadlineExceeded = "MigrationDeadlineExceeded"
)
