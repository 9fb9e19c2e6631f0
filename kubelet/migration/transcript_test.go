package migration_test

import (
	"testing"

	"github.com/cockroachdb/datadriven"

	"podmig.dev/podmig/kubelet/migration/migrationtest"
)

// TestTranscripts runs the stories in testdata. They are the specification to read
// first; "-args -rewrite" writes them anew, and the change is to be read then, too.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		p := migrationtest.NewPlay()
		datadriven.RunTest(t, path, p.Handle)
	})
}
