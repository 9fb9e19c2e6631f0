package patchq

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
)

// hookFile matches the new files in which patches declare hooks.
var hookFile = regexp.MustCompile(`(^|/)hooks?_[a-z0-9_]+\.go$`)

// ownFolders are the top-level folders whose code may set hooks.
var ownFolders = []string{"kubelet", "containerd-cri", "tools", "cluster-setup"}

// hook is an exported variable of a patched package.
type hook struct{ pkg, name string }

// hookSet compares what the patches declare with what our code sets.
type hookSet struct {
	declared map[hook]declared
	set      map[hook]string
	trees    []Tree
}

type declared struct{ upstream, patch string }

func newHooks() *hookSet {
	return &hookSet{declared: map[hook]declared{}, set: map[hook]string{}}
}

// importPath returns the import path of a folder of the tree.
func (t Tree) importPath(dir string) string {
	_, m := t.Source(dir + "/x")
	return path.Join(m.Module, strings.TrimPrefix(dir, m.At))
}

// declare collects the exported variables of the hook files that patches add.
func (h *hookSet) declare(t Tree, patches []Patch, overlay Overlay) error {
	h.trees = append(h.trees, t)
	for _, p := range patches {
		for _, f := range p.Files {
			if !f.New || !hookFile.MatchString(f.Name) || strings.HasSuffix(f.Name, "_test.go") || overlay[f.Name] == nil {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), f.Name, overlay[f.Name], parser.SkipObjectResolution)
			if err != nil {
				return fmt.Errorf("%s: %w", p.Name, err)
			}
			found := false
			for _, name := range packageVars(file) {
				if ast.IsExported(name) {
					h.declared[hook{t.importPath(path.Dir(f.Name)), name}] = declared{t.Upstream.Name, p.Name}
					found = true
				}
			}
			if !found {
				return fmt.Errorf("%s: %s is named like a hook file but declares no exported variable", p.Name, f.Name)
			}
		}
	}
	return nil
}

// packageVars lists the package-level variables of a file.
func packageVars(file *ast.File) []string {
	var names []string
	for _, d := range file.Decls {
		gen, ok := d.(*ast.GenDecl)
		if !ok || gen.Tok != token.VAR {
			continue
		}
		for _, s := range gen.Specs {
			for _, n := range s.(*ast.ValueSpec).Names {
				names = append(names, n.Name)
			}
		}
	}
	return names
}

// use collects the variables of upstream packages that our code sets: by assignment, by taking the address, or by
// calling a method on them.
func (h *hookSet) use(root string) error {
	for _, top := range ownFolders {
		err := filepath.WalkDir(filepath.Join(root, top), func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == "testdata" {
				return filepath.SkipDir
			}
			if d.IsDir() || filepath.Ext(name) != ".go" || strings.HasSuffix(name, "_test.go") {
				return nil
			}
			raw, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, name)
			if err != nil {
				return err
			}
			return h.useFile(rel, raw)
		})
		if err != nil {
			return fmt.Errorf("look for hooks in our code: %w", err)
		}
	}
	return nil
}

func (h *hookSet) useFile(name string, raw []byte) error {
	file, err := parser.ParseFile(token.NewFileSet(), name, raw, 0)
	if err != nil {
		return err
	}
	imports := map[string]string{}
	for _, i := range file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			return err
		}
		local := path.Base(p)
		if i.Name != nil {
			local = i.Name.Name
		} else if len(local) > 1 && local[0] == 'v' && strings.Trim(local[1:], "0123456789") == "" {
			// Major version suffix; k8s API versions such as v1 keep their name.
			if h.upstreamOf(path.Dir(p)) && path.Base(path.Dir(p)) != "core" {
				imports[path.Base(path.Dir(p))] = p
			}
		}
		imports[local] = p
	}
	note := func(e ast.Expr) {
		sel, ok := e.(*ast.SelectorExpr)
		if !ok {
			return
		}
		id, ok := sel.X.(*ast.Ident)
		// A resolved identifier is a local variable, not a package.
		if !ok || id.Obj != nil || !ast.IsExported(sel.Sel.Name) {
			return
		}
		if p, ok := imports[id.Name]; ok && h.upstreamOf(p) {
			h.set[hook{p, sel.Sel.Name}] = name
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for _, l := range n.Lhs {
				note(l)
			}
		case *ast.UnaryExpr:
			if n.Op == token.AND {
				note(n.X)
			}
		case *ast.CallExpr:
			if sel, ok := n.Fun.(*ast.SelectorExpr); ok {
				note(sel.X)
			}
		}
		return true
	})
	return nil
}

// upstreamOf says whether a package belongs to a patched tree.
func (h *hookSet) upstreamOf(pkg string) bool {
	for _, t := range h.trees {
		for _, m := range t.Mounts {
			if pkg == m.Module || strings.HasPrefix(pkg, m.Module+"/") {
				return true
			}
		}
	}
	return false
}

// faults compares both sides for one upstream.
func (h *hookSet) faults(u Upstream) []string {
	var faults []string
	for k, d := range h.declared {
		if d.upstream == u.Name && h.set[k] == "" {
			faults = append(faults, fmt.Sprintf("%s: hook %s.%s is declared but nothing of ours sets it: set it or drop the patch", d.patch, k.pkg, k.name))
		}
	}
	for _, t := range h.trees {
		if t.Upstream.Name != u.Name {
			continue
		}
		for k, where := range h.set {
			if _, ok := h.declared[k]; ok || !t.contains(k.pkg) || t.declares(k.pkg, k.name) {
				continue
			}
			faults = append(faults, fmt.Sprintf("%s sets %s.%s, which neither upstream nor a patch declares", where, k.pkg, k.name))
		}
	}
	sort.Strings(faults)
	return faults
}

// folder returns where a package is in the module cache, or an empty string.
func (t Tree) folder(pkg string) string {
	for _, m := range t.Mounts {
		if rest, ok := strings.CutPrefix(pkg, m.Module); ok && (rest == "" || rest[0] == '/') {
			return filepath.Join(m.Dir, filepath.FromSlash(rest))
		}
	}
	return ""
}

func (t Tree) contains(pkg string) bool { return t.folder(pkg) != "" }

// declares says whether the pristine package has a package-level name. Types count, too: &pkg.Type{} is how values are
// made, not how hooks are set.
func (t Tree) declares(pkg, name string) bool {
	files, err := filepath.Glob(filepath.Join(t.folder(pkg), "*.go"))
	if err != nil {
		return false
	}
	for _, f := range files {
		file, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.SkipObjectResolution)
		if err != nil {
			continue
		}
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.Name == name {
					return true
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						if s.Name.Name == name {
							return true
						}
					case *ast.ValueSpec:
						for _, n := range s.Names {
							if n.Name == name {
								return true
							}
						}
					}
				}
			}
		}
	}
	return false
}
