package mkimage

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestDescriptions reads every image's description as the builder does.
func TestDescriptions(t *testing.T) {
	t.Parallel()
	b := Builder{Sources: "../images"}
	names, err := b.Names()
	if err != nil {
		t.Fatal(err)
	}
	for _, wanted := range []string{"ballast", "coredns", "counter", "nginx", "pause", "postgres", "python", "redis"} {
		if !slices.Contains(names, wanted) {
			t.Errorf("image %s has no description", wanted)
		}
	}
	for _, name := range names {
		description, err := b.read(name)
		if err != nil {
			t.Error(err)
		}
		for path := range description.Modes {
			if _, err := os.Stat(filepath.Join(b.Sources, name, "rootfs", path)); err != nil {
				t.Errorf("image %s sets the mode of a file that it does not have: %v", name, err)
			}
		}
	}
}

func TestDescriptionCheck(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name        string
		description Description
		valid       bool
	}{
		{"program", Description{Go: true}, true},
		{"packages", Description{Packages: []string{"redis-server"}, Entrypoint: []string{"redis-server"}}, true},
		{"packages without a command", Description{Packages: []string{"redis-server"}}, false},
		{"nothing", Description{}, false},
		{"two sources", Description{Go: true, Binary: "coredns"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if err := test.description.check("x"); (err == nil) != test.valid {
				t.Errorf("got %v, valid should be %t", err, test.valid)
			}
		})
	}
}

func TestUnknownImageNamesTheKnownOnes(t *testing.T) {
	t.Parallel()
	if _, err := (Builder{Sources: "../images"}).read("nonsense"); err == nil || !strings.Contains(err.Error(), "redis") {
		t.Errorf("got %v", err)
	}
}

// TestProgramImage builds a whole image of a Go program.
func TestProgramImage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := Builder{Sources: "../images", Output: filepath.Join(dir, "out"), Cache: filepath.Join(dir, "cache")}
	archive, digest, err := b.Build(t.Context(), "pause")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(archive); err != nil || !strings.HasPrefix(digest, "sha256:") {
		t.Errorf("got %s, %v", digest, err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*", "*.program"))
	if err != nil || len(left) > 0 {
		t.Errorf("the program is left beside its layer: %v, %v", left, err)
	}
}
