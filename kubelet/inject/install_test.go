//go:build podmig_patched

package inject

import (
	"os"
	"path/filepath"
	"testing"

	"podmig.dev/podmig/kubelet/journal"
	"podmig.dev/podmig/kubelet/migration"
)

// With the gate off a journal is looked for and never made.
func TestLeft(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "migrations")
	if rs, err := left(dir); err != nil || len(rs) != 0 {
		t.Errorf("without a journal: %v, %v", rs, err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the journal was made: %v", err)
	}
	j, err := journal.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if rs, err := left(dir); err != nil || len(rs) != 0 {
		t.Errorf("with an empty journal: %v, %v", rs, err)
	}
	r := migration.Record{Version: migration.RecordVersion, Side: migration.SideSource, State: string(migration.SourceGivenAway), Identity: migration.Identity{
		Session: "s", Namespace: "ns", SourcePod: "web", SourceUID: "u", ClonePod: "web-2", PeerNode: "b", SandboxID: "sb", Containers: []migration.Container{{Name: "c", ID: "1"}},
	}}
	if err := j.Put(r); err != nil {
		t.Fatal(err)
	}
	if rs, err := left(dir); err != nil || len(rs) != 1 || rs[0].Identity.Session != "s" {
		t.Errorf("with a record: %v, %v", rs, err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*s*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if rs, err := left(dir); err == nil {
		t.Errorf("with a broken record: %v", rs)
	}
}
