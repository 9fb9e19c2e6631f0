package nodeimage

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"podmig.dev/podmig/cluster-setup/nodeconfig"
)

// newBuilder has stand-ins for all binaries.
func newBuilder(t *testing.T) Builder {
	t.Helper()
	b := Builder{Dir: t.TempDir(), Bin: t.TempDir(), Values: nodeconfig.Values{PauseImage: "podmig.dev/pause:v1", CgroupDriver: "systemd"}}
	names := slices.Clone(binaries)
	for _, plugin := range plugins {
		names = append(names, filepath.Join("cni", plugin))
	}
	for _, name := range names {
		path := filepath.Join(b.Bin, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func TestPieces(t *testing.T) {
	t.Parallel()
	b := newBuilder(t)
	layer, err := b.pieces()
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(layer.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	modes := map[string]int64{}
	for in := tar.NewReader(file); ; {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		modes[header.Name] = header.Mode
	}
	for name, mode := range map[string]int64{
		"usr/local/bin/kubelet": 0o755, "opt/cni/bin/ptp": 0o755, "etc/containerd/config.toml": 0o644,
		"etc/systemd/system/containerd.service": 0o644, "etc/kubernetes/kubelet.yaml": 0o644,
	} {
		if modes[name] != mode {
			t.Errorf("%s has mode %o, want %o", name, modes[name], mode)
		}
	}
}

func TestPiecesAreRepeatable(t *testing.T) {
	t.Parallel()
	one, err := newBuilder(t).pieces()
	if err != nil {
		t.Fatal(err)
	}
	two, err := newBuilder(t).pieces()
	if err != nil {
		t.Fatal(err)
	}
	if one.Digest != two.Digest {
		t.Errorf("%s and %s differ", one.Digest, two.Digest)
	}
}

func TestPiecesNeedAllBinaries(t *testing.T) {
	t.Parallel()
	b := newBuilder(t)
	if err := os.Remove(filepath.Join(b.Bin, "runc")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.pieces(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	left, err := filepath.Glob(filepath.Join(b.Dir, "*"))
	hidden, err2 := filepath.Glob(filepath.Join(b.Dir, ".*"))
	if err != nil || err2 != nil || len(left)+len(hidden) > 0 {
		t.Errorf("half a layer is left: %v %v", left, hidden)
	}
}
