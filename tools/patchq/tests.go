package patchq

import (
	"fmt"
	"path"
	"sort"
	"strings"
)

// TestPackages lists the upstream packages whose own tests have to stay green, as patterns for go test: every package
// that a patch changes, and those that its header names by import path, or by a path of the tree that begins with a
// dot.
func (r Repo) TestPackages() ([]string, error) {
	seen := map[string]bool{}
	for _, u := range Upstreams {
		tree, err := LoadTree(r.Root, u, "")
		if err != nil {
			return nil, err
		}
		patches, err := ReadQueue(r.Queue(u))
		if err != nil {
			return nil, err
		}
		for _, p := range patches {
			for _, f := range p.Files {
				if path.Ext(f.Name) == ".go" && !f.Deleted && !strings.Contains(f.Name, "/testdata/") {
					seen[tree.importPath(path.Dir(f.Name))] = true
				}
			}
			for _, name := range strings.Fields(p.Trailers["Tests"]) {
				pattern, err := tree.testPattern(strings.TrimRight(name, ","))
				if err != nil {
					return nil, fmt.Errorf("%s: %w", p.Name, err)
				}
				seen[pattern] = true
			}
		}
	}
	var out []string
	for p := range seen {
		if !coveredByOther(p, seen) {
			out = append(out, p)
		}
	}
	sort.Strings(out)
	return out, nil
}

// testPattern turns a word of a Tests trailer into a package pattern.
func (t Tree) testPattern(name string) (string, error) {
	if rel, ok := strings.CutPrefix(name, "./"); ok {
		rest, all := strings.CutSuffix(rel, "...")
		p := t.importPath(path.Clean(rest))
		if all {
			p += "/..."
		}
		return p, nil
	}
	if !t.contains(strings.TrimSuffix(name, "/...")) {
		return "", fmt.Errorf("Tests names %q, which is no package of %s", name, t.Upstream.Name)
	}
	return name, nil
}

// coveredByOther says whether a pattern with dots already includes the package.
func coveredByOther(p string, all map[string]bool) bool {
	for dir := strings.TrimSuffix(p, "/..."); dir != "." && dir != "/"; dir = path.Dir(dir) {
		if q := dir + "/..."; q != p && all[q] {
			return true
		}
	}
	return false
}
