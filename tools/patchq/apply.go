package patchq

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// Overlay is what has to differ from a pristine tree: contents by path, nil for a file that must be absent.
type Overlay map[string][]byte

// Paths returns the paths in order.
func (o Overlay) Paths() []string {
	paths := make([]string, 0, len(o))
	for p := range o {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	return paths
}

// Applied is the outcome of one patch.
type Applied struct {
	Patch Patch
	// Offsets are git's remarks about hunks that were found on other lines than the patch says.
	Offsets []string
	Err     error
}

// touched returns every path that the patches name.
func touched(patches []Patch) []string {
	seen := map[string]bool{}
	var paths []string
	for _, p := range patches {
		for _, f := range p.Files {
			if !seen[f.Name] {
				seen[f.Name] = true
				paths = append(paths, f.Name)
			}
		}
	}
	sort.Strings(paths)
	return paths
}

// copyPristine puts the pristine versions of the paths below dir; paths unknown to the tree are left out.
func copyPristine(t Tree, dir string, paths []string) error {
	for _, p := range paths {
		raw, err := readPristine(t, p)
		if err != nil {
			return err
		}
		if raw == nil {
			continue
		}
		if err := writeFile(filepath.Join(dir, filepath.FromSlash(p)), raw); err != nil {
			return err
		}
	}
	return nil
}

// readPristine returns the content of a file, or nil if the tree does not have it.
func readPristine(t Tree, name string) ([]byte, error) {
	if !filepath.IsLocal(filepath.FromSlash(name)) {
		return nil, fmt.Errorf("path %q leads out of the tree", name)
	}
	src, _ := t.Source(name)
	raw, err := os.ReadFile(src)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pristine source: %w", err)
	}
	if raw == nil {
		raw = []byte{}
	}
	return raw, nil
}

// apply applies patches in order to a scratch folder that holds only the files they touch, and stops at the first
// that fails.
func apply(dir string, patches []Patch) []Applied {
	var results []Applied
	for _, p := range patches {
		r := Applied{Patch: p}
		r.Offsets, r.Err = applyOne(dir, p)
		results = append(results, r)
		if r.Err != nil {
			break
		}
	}
	return results
}

func applyOne(dir string, p Patch, flags ...string) ([]string, error) {
	abs, err := filepath.Abs(p.Path)
	if err != nil {
		return nil, fmt.Errorf("find patch: %w", err)
	}
	args := append([]string{"-c", "core.autocrlf=false", "apply", "--verbose", "--whitespace=nowarn"}, flags...)
	cmd := gitCommand(dir, append(args, abs)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s does not apply: refresh it with the open/save loop of patches/README.md: %w",
			p.Name, &CommandError{Command: "git apply " + p.Name, Output: string(out), Err: err})
	}
	var offsets []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "offset") || strings.Contains(line, "fuzz") {
			offsets = append(offsets, strings.TrimSpace(line))
		}
	}
	return offsets, nil
}

// PatchOverlay applies the queue to a pristine tree and returns the result as an overlay, with the remarks per patch.
func PatchOverlay(t Tree, patches []Patch) (Overlay, []Applied, error) {
	dir, err := os.MkdirTemp("", "patchq-apply-")
	if err != nil {
		return nil, nil, fmt.Errorf("make scratch folder: %w", err)
	}
	defer os.RemoveAll(dir)
	paths := touched(patches)
	if err := copyPristine(t, dir, paths); err != nil {
		return nil, nil, err
	}
	results := apply(dir, patches)
	for _, r := range results {
		if r.Err != nil {
			return nil, results, r.Err
		}
	}
	o := Overlay{}
	for _, p := range paths {
		raw, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(p)))
		if errors.Is(err, fs.ErrNotExist) {
			o[p] = nil
			continue
		}
		if err != nil {
			return nil, results, fmt.Errorf("read patched file: %w", err)
		}
		if raw == nil {
			raw = []byte{}
		}
		o[p] = raw
	}
	return o, results, nil
}

// writeFile writes a file and the folders above it.
func writeFile(name string, raw []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	if err := os.WriteFile(name, raw, 0o644); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}
