package patchq

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/mod/modfile"
)

// Upstream is one project whose sources are patched.
type Upstream struct {
	// Name is the folder below patches/ and below .build/src/.
	Name string
	// Module is the Go module that forms the root of the tree.
	Module string
	// Staging says where the modules live that upstream develops in the same tree but publishes on their own.
	// Their archives are put back in place, so that patches read like upstream's own and upstream's generators
	// find the layout they expect. Empty for upstreams without such modules.
	Staging string
}

// Upstreams lists every upstream in the order in which it is assembled.
var Upstreams = []Upstream{
	{Name: "kubernetes", Module: "k8s.io/kubernetes", Staging: "staging/src"},
	{Name: "containerd", Module: "github.com/containerd/containerd/v2"},
	{Name: "runc", Module: "github.com/opencontainers/runc"},
}

// FindUpstream returns the upstream with that name.
func FindUpstream(name string) (Upstream, error) {
	var names []string
	for _, u := range Upstreams {
		if u.Name == name {
			return u, nil
		}
		names = append(names, u.Name)
	}
	return Upstream{}, fmt.Errorf("unknown upstream %q: use one of %s", name, strings.Join(names, ", "))
}

// Mount is one module placed at a folder of the assembled tree.
type Mount struct {
	// At is the slash-separated folder inside the tree, empty for the root.
	At string
	// Module, Version and Sum identify the contents; Sum is what go.sum pins.
	Module, Version, Sum string
	// Dir is where the Go module cache keeps the contents.
	Dir string
}

// Tree is the pristine source tree of an upstream, as a set of modules of the cache.
type Tree struct {
	Upstream Upstream
	Version  string
	// Time is when upstream tagged the version.
	Time time.Time
	// Mounts holds the root first.
	Mounts []Mount
}

// ID changes whenever any pristine file of the tree may have changed.
func (t Tree) ID() string {
	h := sha256.New()
	for _, m := range t.Mounts {
		fmt.Fprintf(h, "%s %s %s %s\n", m.At, m.Module, m.Version, m.Sum)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Source returns the file of the module cache behind a path of the tree, and the mount it belongs to.
func (t Tree) Source(name string) (string, Mount) {
	best := t.Mounts[0]
	for _, m := range t.Mounts[1:] {
		if strings.HasPrefix(name, m.At+"/") && len(m.At) > len(best.At) {
			best = m
		}
	}
	return filepath.Join(best.Dir, filepath.FromSlash(strings.TrimPrefix(strings.TrimPrefix(name, best.At), "/"))), best
}

// LoadTree finds the pristine sources of an upstream in the module cache and fetches what is missing. The versions
// are those of the module file at root; version overrides the root module's for drift reports, with the staging
// modules following upstream's own numbering rule (v1.x.y publishes v0.x.y).
func LoadTree(root string, u Upstream, version string) (Tree, error) {
	raw, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		return Tree{}, fmt.Errorf("read module file: %w", err)
	}
	mod, err := modfile.Parse("go.mod", raw, nil)
	if err != nil {
		return Tree{}, fmt.Errorf("parse module file: %w", err)
	}
	pinned := version == ""
	sums := map[string]string{}
	if pinned {
		if sums, err = readSums(filepath.Join(root, "go.sum")); err != nil {
			return Tree{}, err
		}
		if version = requiredVersion(mod, u.Module); version == "" {
			return Tree{}, fmt.Errorf("go.mod does not require %s: add it with go get", u.Module)
		}
	}

	type want struct{ at, module, version string }
	wants := []want{{"", u.Module, version}}
	if u.Staging != "" {
		for _, r := range mod.Replace {
			if r.Old.Path != r.New.Path {
				continue
			}
			v := r.New.Version
			if !pinned {
				v = "v0" + strings.TrimPrefix(version, "v1")
			} else if sums[r.New.Path+" "+v] == "" {
				// Only its go.mod is pinned: nothing we build or generate needs the sources.
				continue
			}
			wants = append(wants, want{path.Join(u.Staging, r.New.Path), r.New.Path, v})
		}
	}

	args := []string{"mod", "download", "-json"}
	for _, w := range wants {
		args = append(args, w.module+"@"+w.version)
	}
	cmd := exec.Command("go", args...)
	cmd.Dir = root
	if !pinned {
		// Another version is not in go.sum; the checksum database still guards it, and our files stay as they are.
		tmp, err := os.MkdirTemp("", "patchq-mod-")
		if err != nil {
			return Tree{}, fmt.Errorf("make scratch folder: %w", err)
		}
		defer os.RemoveAll(tmp)
		if err := os.WriteFile(filepath.Join(tmp, "go.mod"), []byte("module scratch\n"), 0o644); err != nil {
			return Tree{}, fmt.Errorf("write scratch module: %w", err)
		}
		cmd.Dir = tmp
	}
	out, runErr := output(cmd)

	type info struct{ Path, Version, Info, Dir, Sum, Error string }
	got := map[string]info{}
	dec := json.NewDecoder(bytes.NewReader(out))
	for dec.More() {
		var i info
		if err := dec.Decode(&i); err != nil {
			return Tree{}, fmt.Errorf("read go mod download output: %w", err)
		}
		got[i.Path] = i
	}
	tree := Tree{Upstream: u, Version: version}
	for _, w := range wants {
		i, ok := got[w.module]
		if !ok || i.Error != "" {
			if !pinned && w.at != "" {
				// Older and newer releases have other staging modules.
				continue
			}
			return Tree{}, errors.Join(fmt.Errorf("fetch %s@%s: %s", w.module, w.version, i.Error), runErr)
		}
		if pinned && sums[w.module+" "+w.version] != i.Sum {
			return Tree{}, fmt.Errorf("%s@%s has hash %s but go.sum pins %q: clear the module cache or fix go.sum",
				w.module, w.version, i.Sum, sums[w.module+" "+w.version])
		}
		if w.at == "" {
			if tree.Time, err = readTime(i.Info); err != nil {
				return Tree{}, err
			}
		}
		tree.Mounts = append(tree.Mounts, Mount{At: w.at, Module: w.module, Version: w.version, Sum: i.Sum, Dir: i.Dir})
	}
	return tree, nil
}

// readTime reads the release time from the cache's description of a module.
func readTime(name string) (time.Time, error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return time.Time{}, fmt.Errorf("read module description: %w", err)
	}
	var d struct{ Time time.Time }
	if err := json.Unmarshal(raw, &d); err != nil {
		return time.Time{}, fmt.Errorf("read module description: %w", err)
	}
	return d.Time, nil
}

func requiredVersion(mod *modfile.File, module string) string {
	for _, r := range mod.Require {
		if r.Mod.Path == module {
			return r.Mod.Version
		}
	}
	return ""
}

// readSums returns the archive hashes of a go.sum, keyed by "module version".
func readSums(name string) (map[string]string, error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read module sums: %w", err)
	}
	sums := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) == 3 && !strings.HasSuffix(f[1], "/go.mod") {
			sums[f[0]+" "+f[1]] = f[2]
		}
	}
	return sums, nil
}
