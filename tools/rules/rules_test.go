package rules

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// root is the repository, seen from this package.
const root = "../.."

// tags admit every file, so that code for the patched build and for root is held to the rules, too.
const tags = "podmig_patched,root,e2e"

// listPackages asks the Go tool for all packages of ours.
func listPackages(t *testing.T) []Package {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-tags", tags, "-json=ImportPath,Name,Imports,Incomplete", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var packages []Package
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath, Name string
			Imports          []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		rel, ok := own(p.ImportPath)
		if !ok {
			t.Fatalf("%s is not in module %s", p.ImportPath, Module)
		}
		packages = append(packages, Package{Path: rel, Name: p.Name, Imports: p.Imports})
	}
	if len(packages) < 5 {
		t.Fatalf("the Go tool lists only %d packages", len(packages))
	}
	return packages
}

func TestImports(t *testing.T) {
	for _, f := range CheckImports(listPackages(t), Imports) {
		t.Error(f)
	}
}

// TestPackageComments: a reader meets a package through its comment, so each has exactly one, in the form that the
// documentation tools expect.
func TestPackageComments(t *testing.T) {
	for _, p := range listPackages(t) {
		files, err := filepath.Glob(filepath.Join(root, p.Path, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		// A package that consists of tests is described in one of them.
		if code := withoutTests(files); len(code) > 0 {
			files = code
		}
		var with []string
		for _, name := range files {
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Error(err)
				continue
			}
			if file.Doc == nil || file.Doc.Text() == "" {
				continue
			}
			with = append(with, filepath.Base(name))
			prefix := "Package " + file.Name.Name + " "
			if file.Name.Name == "main" {
				prefix = "Command "
			}
			if !strings.HasPrefix(file.Doc.Text(), prefix) {
				t.Errorf("%s: the package comment does not begin with %q", name, prefix)
			}
		}
		switch len(with) {
		case 0:
			t.Errorf("%s has no package comment: say in one sentence what it is, then what it does and what not", p.Path)
		case 1:
		default:
			t.Errorf("%s has %d package comments, in %s: keep one", p.Path, len(with), strings.Join(with, ", "))
		}
	}
}

func withoutTests(files []string) []string {
	return slices.DeleteFunc(slices.Clone(files), func(f string) bool { return strings.HasSuffix(f, "_test.go") })
}

func TestTopLevel(t *testing.T) {
	for _, f := range CheckTopLevel(firstElements(trackedFiles(t))) {
		t.Error(f)
	}
}

func TestText(t *testing.T) {
	looked := 0
	for _, name := range trackedFiles(t) {
		switch filepath.Ext(name) {
		case ".sum", ".pb", ".svg", ".png", ".gz", ".img":
			continue
		case ".patch":
			// Context lines are upstream's; patchq lints what the patches add.
			continue
		}
		raw, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		looked++
		if generated(raw) {
			continue
		}
		for _, f := range CheckText(name, raw) {
			t.Error(f)
		}
		if filepath.Ext(name) == ".go" {
			for _, f := range CheckLength(name, raw) {
				t.Error(f)
			}
		}
	}
	if looked < 20 {
		t.Fatalf("only %d files were looked at", looked)
	}
}

// TestFoldersHaveReadme: every top-level folder explains itself.
func TestFoldersHaveReadme(t *testing.T) {
	for _, dir := range []string{".", "patches", "patches/kubernetes", "patches/containerd", "patches/runc", "cri-api", "kubelet", "containerd-cri", "tools", "cluster-setup"} {
		if _, err := os.Stat(filepath.Join(root, dir, "README.md")); err != nil {
			t.Errorf("%s has no README.md", dir)
		}
	}
}

// trackedFiles lists what belongs to the repository: what git tracks, or without git (an unpacked archive) everything
// that is not a build product.
func trackedFiles(t *testing.T) []string {
	t.Helper()
	cmd := exec.Command("git", "ls-files")
	cmd.Dir = root
	if out, err := cmd.Output(); err == nil {
		return strings.Fields(string(out))
	}
	var names []string
	err := filepath.WalkDir(root, func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".build" || d.Name() == ".git") {
			return filepath.SkipDir
		}
		if d.Type().IsRegular() {
			rel, relErr := filepath.Rel(root, name)
			names, err = append(names, rel), relErr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func firstElements(names []string) []string {
	seen := map[string]bool{}
	var out []string
	for _, n := range names {
		first := strings.SplitN(filepath.ToSlash(n), "/", 2)[0]
		if !seen[first] {
			seen[first] = true
			out = append(out, first)
		}
	}
	return out
}

// The rest shows that the rules bite.

func TestCheckImportsBites(t *testing.T) {
	pkg := func(path string, imports ...string) Package { return Package{Path: path, Imports: imports} }
	for _, c := range []struct {
		name     string
		rule     Rule
		packages []Package
		want     string
	}{
		{"nothing wrong", Rule{Packages: "a", Own: none, External: none}, []Package{pkg("a", "fmt", "os/exec")}, ""},
		{"own not allowed", Rule{Packages: "a", Own: []string{"c"}}, []Package{pkg("a", Module+"/b")}, "a imports b"},
		{"own allowed", Rule{Packages: "a", Own: []string{"b/..."}}, []Package{pkg("a", Module+"/b/c")}, ""},
		{"external not allowed", Rule{Packages: "a", External: []string{"k8s.io/api"}}, []Package{pkg("a", "k8s.io/apimachinery")}, "a imports k8s.io/apimachinery"},
		{"external allowed", Rule{Packages: "a", External: []string{"k8s.io/api"}}, []Package{pkg("a", "k8s.io/api/core/v1")}, ""},
		{"denied directly", Rule{Packages: "a", Deny: []string{kubernetes}}, []Package{pkg("a", kubernetes+"/pkg/kubelet")}, "a reaches k8s.io/kubernetes"},
		{"denied through ours", Rule{Packages: "a", Deny: []string{kubernetes}},
			[]Package{pkg("a", Module+"/b"), pkg("b", kubernetes)}, "a reaches b -> k8s.io/kubernetes"},
		{"standard library denied directly only", Rule{Packages: "a", Deny: []string{"os"}},
			[]Package{pkg("a", Module+"/b"), pkg("b", "os")}, ""},
		{"standard library denied", Rule{Packages: "a", Deny: []string{"os"}}, []Package{pkg("a", "os/exec")}, "a reaches os/exec"},
		{"excepted", Rule{Packages: "a/...", Except: []string{"a/b"}, Deny: []string{kubernetes}},
			[]Package{pkg("a"), pkg("a/b", kubernetes)}, ""},
		{"below", Rule{Packages: "a/...", Deny: []string{kubernetes}}, []Package{pkg("a/b", kubernetes)}, "a/b reaches"},
		{"target gone", Rule{Packages: "gone"}, []Package{pkg("a")}, "applies to no package"},
		{"program imported", Rule{Packages: "a"}, []Package{pkg("a", Module+"/x/cmd/y")}, "nothing imports a program"},
	} {
		t.Run(c.name, func(t *testing.T) {
			faults := strings.Join(CheckImports(c.packages, []Rule{c.rule}), "\n")
			if c.want == "" && faults != "" || !strings.Contains(faults, c.want) {
				t.Fatalf("faults %q, want %q", faults, c.want)
			}
		})
	}
}

func TestCheckTextBites(t *testing.T) {
	for _, c := range []struct {
		name, text string
		faults     int
	}{
		{"clean", "func f() { t.Log(\"a workshop at home\") }\n", 0},
		{"developer's path", "x := \"/ho" + "me/someone/src\"\n", 1},
		{"workplace", "see /wor" + "k/notes\n", 1},
		{"home of root", "cd /ro" + "ot/go/pkg\n", 1},
		{"unfinished", "// TO" + "DO: later\n", 1},
		{"skips itself", "t.Sk" + "ip(\"no root\")\n", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			if faults := CheckText("x.go", []byte(c.text)); len(faults) != c.faults {
				t.Fatalf("faults %q, want %d", faults, c.faults)
			}
		})
	}
}

func TestCheckTopLevelBites(t *testing.T) {
	if faults := CheckTopLevel(TopLevel); len(faults) != 0 {
		t.Errorf("the layout itself has faults: %q", faults)
	}
	if faults := strings.Join(CheckTopLevel([]string{"docs"}), "\n"); !strings.Contains(faults, "docs does not belong") || !strings.Contains(faults, "kubelet is missing") {
		t.Errorf("faults %q", faults)
	}
}
