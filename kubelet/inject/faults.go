//go:build podmig_patched && podmig_faults

package inject

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"

	"podmig.dev/podmig/kubelet/migration"
)

// faultDir has a FIFO for each point at which a test wants to stop a migration.
const faultDir = "/run/podmig-faults"

// faultPoint stops the loop of a migration at a point that has a FIFO: until a test
// has opened it for writing, which tells the test that the migration is there, and
// closed it again, which lets it go on. In between the test breaks what it likes.
// Only kubelets for tests are built with this file.
var faultPoint = func(name string) {
	f, err := os.Open(filepath.Join(faultDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		klog.ErrorS(err, "Fault point cannot be opened", "point", name)
		return
	}
	defer f.Close()
	klog.InfoS("Stopped at a fault point", "point", name)
	// Nothing is ever written; the read returns when the test closes its end.
	if _, err := f.Read(make([]byte, 1)); err != nil {
		klog.InfoS("Going on from a fault point", "point", name)
	}
}

// deadlines are those of a file beside the FIFOs, if there is one, read when the
// kubelet starts: a test cannot wait for as long as a user can.
func deadlines() (migration.Deadlines, error) {
	var d migration.Deadlines
	b, err := os.ReadFile(filepath.Join(faultDir, "deadlines.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return d, err
	}
	return d, json.Unmarshal(b, &d)
}
