package runc

import (
	"os"
	"path/filepath"
	"testing"
)

func TestRemoveRoots(t *testing.T) {
	log := filepath.Join(t.TempDir(), "restore.log")
	if err := removeRoots(log); err != nil {
		t.Errorf("without a log: %v", err)
	}
	roots := filepath.Join("/tmp", ".criu.mntns.Zz09aA")
	other := filepath.Join("/tmp", ".criu.mntns.Zz09bB")
	for _, dir := range []string{roots, other} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(dir) })
	}
	// A name of the container's choice does not count.
	text := "(00.000001) mnt: \tThe mount 7 is bind @ " + other + "/mnt-0000000007 /data\n" +
		"(00.040332) mnt: \t\tWill mount 332 @ " + roots + "/mnt-0000000332 /sys/firmware\n"
	if err := os.WriteFile(log, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := removeRoots(log); err != nil && os.Getuid() == 0 {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(roots); os.Getuid() == 0 && !os.IsNotExist(err) {
		t.Errorf("the directory of the restore is there: %v", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("the directory of another restore: %v", err)
	}
}
