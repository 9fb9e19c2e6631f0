package patchq

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/modfile"
)

// Identity says which sources a binary was built from.
type Identity struct {
	// Version is upstream's, Time when it was released, Patches how many of ours are on top.
	Version string
	Time    time.Time
	Patches int
	// Revision has the form of a commit hash and changes with the sources and the queue.
	Revision string
}

// Identify describes the patched sources of an upstream.
func (r Repo) Identify(u Upstream) (Identity, error) {
	tree, err := LoadTree(r.Root, u, "")
	if err != nil {
		return Identity{}, err
	}
	patches, err := ReadQueue(r.Queue(u))
	if err != nil {
		return Identity{}, err
	}
	h := sha256.New()
	fmt.Fprintln(h, tree.ID())
	for _, p := range patches {
		fmt.Fprintf(h, "%s %d\n", p.Name, len(p.Raw))
		h.Write(p.Raw)
	}
	return Identity{
		Version: tree.Version, Time: tree.Time, Patches: len(patches),
		Revision: hex.EncodeToString(h.Sum(nil))[:40],
	}, nil
}

// RequiredVersion returns the version of a module that our module file pins.
func (r Repo) RequiredVersion(module string) (string, error) {
	raw, err := os.ReadFile(filepath.Join(r.Root, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("read module file: %w", err)
	}
	mod, err := modfile.Parse("go.mod", raw, nil)
	if err != nil {
		return "", fmt.Errorf("parse module file: %w", err)
	}
	v := requiredVersion(mod, module)
	if v == "" {
		return "", fmt.Errorf("go.mod does not require %s", module)
	}
	return v, nil
}
