package cluster

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestLinkTree(t *testing.T) {
	t.Parallel()
	source, target := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	for path, content := range map[string]string{
		"content/blobs/sha256/abc": "blob", "metadata/meta.db": "database", "io.containerd.grpc.v1.introspection/uuid": "name",
	} {
		if err := writeFile(filepath.Join(source, path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("abc", filepath.Join(source, "content/link")); err != nil {
		t.Fatal(err)
	}
	old := time.Unix(1000000000, 0)
	folder := filepath.Join(source, "content/blobs")
	if err := os.Chmod(folder, 0o1750); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(folder, old, old); err != nil {
		t.Fatal(err)
	}
	if err := linkTree(source, target); err != nil {
		t.Fatal(err)
	}
	same := func(path string) bool {
		one, err := os.Lstat(filepath.Join(source, path))
		if err != nil {
			t.Fatal(err)
		}
		two, err := os.Lstat(filepath.Join(target, path))
		if err != nil {
			t.Fatal(err)
		}
		return os.SameFile(one, two)
	}
	if !same("content/blobs/sha256/abc") || !same("content/link") {
		t.Error("files that never change are not shared")
	}
	if same("metadata/meta.db") {
		t.Error("two containerds would write into one database")
	}
	if _, err := os.Stat(filepath.Join(target, "io.containerd.grpc.v1.introspection")); !os.IsNotExist(err) {
		t.Errorf("two containerds would have one name: %v", err)
	}
	info, err := os.Stat(filepath.Join(target, "content/blobs"))
	if err != nil {
		t.Fatal(err)
	}
	if !info.ModTime().Equal(old) || info.Mode().Perm() != 0o750 {
		t.Errorf("folder became %v from %s", info.Mode(), info.ModTime())
	}
}

func TestOldStoresAreRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range storesKept + 2 {
		store := filepath.Join(dir, storePrefix+string(rune('a'+i)))
		if err := os.Mkdir(store, 0o755); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(int64(1000000000+i), 0)
		if err := os.Chtimes(store, when, when); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeOldStores(dir); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != storesKept || filepath.Base(left[0]) != storePrefix+"c" {
		t.Errorf("left are %v, %v", left, err)
	}
}
