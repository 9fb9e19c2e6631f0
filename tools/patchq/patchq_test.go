package patchq

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sample is a checkout with a queue of two patches over a made-up upstream of two modules. Nothing in it needs the
// network or the module cache.
type sample struct {
	repo Repo
	tree Tree
	u    Upstream
}

const header = `

Why it is needed.

Patch-Class: hook
Upstream: none yet
Drop-When: upstream has it
Used-By: kubelet/inject
Tests: ./pkg/
`

func newSample(t *testing.T) sample {
	t.Helper()
	u := Upstream{Name: "kubernetes", Module: "example.org/up", Staging: "staging"}
	root, cache := t.TempDir(), t.TempDir()
	put(t, filepath.Join(cache, "up", "go.mod"), "module example.org/up\n")
	put(t, filepath.Join(cache, "up", "pkg", "a.go"), "package pkg\n\n// One.\n// Two.\n// Three.\n\nfunc A() int {\n\treturn 1\n}\n\nfunc B() int {\n\treturn 2\n}\n")
	put(t, filepath.Join(cache, "up", "pkg", "crlf.txt"), "one\r\ntwo\r\n")
	put(t, filepath.Join(cache, "up", ".gitattributes"), "* text=auto\n")
	put(t, filepath.Join(cache, "api", "types.go"), "package api\n\ntype T struct{}\n")
	tree := Tree{Upstream: u, Version: "v1.0.0", Mounts: []Mount{
		{Module: "example.org/up", Version: "v1.0.0", Dir: filepath.Join(cache, "up")},
		{At: "staging/example.org/api", Module: "example.org/api", Version: "v0.1.0", Dir: filepath.Join(cache, "api")},
	}}
	s := sample{repo: Repo{Root: root, Log: testLog{t}}, tree: tree, u: u}

	// The queue is made the way a developer makes it.
	dir := s.open(t, nil)
	put(t, filepath.Join(dir, "pkg", "a.go"), "package pkg\n\n// One.\n// Two.\n// Three.\n\nfunc A() int {\n\tHook()\n\treturn 1\n}\n\nfunc B() int {\n\treturn 2\n}\n")
	put(t, filepath.Join(dir, "pkg", "hooks_a.go"), "package pkg\n\n// Hook does nothing by default.\nvar Hook = func() {}\n")
	commit(t, dir, "pkg: ask a hook"+header)
	put(t, filepath.Join(dir, "staging", "example.org", "api", "types.go"), "package api\n\ntype T struct{ Name string }\n")
	commit(t, dir, "api: add a name"+header)
	saved, err := s.repo.Save(u, dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(saved.Written, " "); got != "0010-pkg-ask-a-hook.patch 0020-api-add-a-name.patch" {
		t.Fatalf("saved %q", got)
	}
	return s
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// open does what Repo.Open does, without the module cache.
func (s sample) open(t *testing.T, patches []Patch) string {
	t.Helper()
	dir := t.TempDir()
	if err := s.tree.CopyTo(dir); err != nil {
		t.Fatal(err)
	}
	if err := series(dir, patches); err != nil {
		t.Fatal(err)
	}
	if err := remember(dir, patches); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (s sample) queue(t *testing.T) []Patch {
	t.Helper()
	patches, err := ReadQueue(s.repo.Queue(s.u))
	if err != nil {
		t.Fatal(err)
	}
	return patches
}

func put(t *testing.T, name, text string) {
	t.Helper()
	if err := writeFile(name, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func commit(t *testing.T, dir, message string) {
	t.Helper()
	run(t, dir, "add", "--all")
	run(t, dir, "commit", "--quiet", "--message", message)
}

func run(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out, err := git(dir, args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestSaveKeepsUnchangedPatches(t *testing.T) {
	s := newSample(t)
	before := s.queue(t)
	dir := s.open(t, before)
	saved, err := s.repo.Save(s.u, dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(saved.Written)+len(saved.Removed) != 0 {
		t.Fatalf("an unchanged queue was rewritten: %+v", saved)
	}
	if got := get(t, filepath.Join(dir, "pkg", "crlf.txt")); got != "one\r\ntwo\r\n" {
		t.Errorf("line ends changed to %q", got)
	}
	// A developer's git configuration must not matter.
	t.Setenv("GIT_CONFIG_COUNT", "1")
	t.Setenv("GIT_CONFIG_KEY_0", "diff.noprefix")
	t.Setenv("GIT_CONFIG_VALUE_0", "true")
	faults, _, err := checkApply(s.tree, s.queue(t))
	if err != nil || len(faults) > 0 {
		t.Fatalf("faults %q, error %v", faults, err)
	}
}

func TestSaveNewPatchBetween(t *testing.T) {
	s := newSample(t)
	if err := os.Rename(filepath.Join(s.repo.Queue(s.u), "0020-api-add-a-name.patch"),
		filepath.Join(s.repo.Queue(s.u), "0200-api-add-a-name.patch")); err != nil {
		t.Fatal(err)
	}
	dir := s.open(t, s.queue(t))
	run(t, dir, "reset", "--quiet", "--hard", "HEAD~1")
	put(t, filepath.Join(dir, "pkg", "new.go"), "package pkg\n")
	commit(t, dir, "pkg: add newFile"+header)
	run(t, dir, "cherry-pick", "opened")
	saved, err := s.repo.Save(s.u, dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(saved.Written, " "); got != "0020-pkg-add-new-file.patch" {
		t.Fatalf("wrote %q", got)
	}
	if len(saved.Removed) != 0 || len(s.queue(t)) != 3 {
		t.Fatalf("removed %q, %d patches left", saved.Removed, len(s.queue(t)))
	}
}

func TestSaveNewSubjectKeepsNumber(t *testing.T) {
	s := newSample(t)
	dir := s.open(t, s.queue(t))
	run(t, dir, "commit", "--quiet", "--amend", "--message", "api: add another name"+header)
	saved, err := s.repo.Save(s.u, dir)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(saved.Written, " ") != "0020-api-add-another-name.patch" ||
		strings.Join(saved.Removed, " ") != "0020-api-add-a-name.patch" {
		t.Fatalf("saved %+v", saved)
	}
}

func TestSaveRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(t *testing.T, s sample, dir string)
		want string
	}{
		{"uncommitted work", func(t *testing.T, _ sample, dir string) {
			put(t, filepath.Join(dir, "pkg", "a.go"), "package pkg\n")
		}, "uncommitted changes"},
		{"empty queue", func(t *testing.T, _ sample, dir string) {
			run(t, dir, "reset", "--quiet", "--hard", "base")
		}, "an empty queue is not saved"},
		{"somebody else was faster", func(t *testing.T, s sample, dir string) {
			name := filepath.Join(s.repo.Queue(s.u), "0020-api-add-a-name.patch")
			put(t, name, strings.Replace(get(t, name), "Why it is needed.", "Why it is really needed.", 1))
			put(t, filepath.Join(dir, "staging", "example.org", "api", "types.go"), "package api\n\ntype T struct{ Name, Other string }\n")
			run(t, dir, "commit", "--quiet", "--all", "--amend", "--no-edit")
		}, "changed in the queue since it was opened"},
		{"other order", func(t *testing.T, s sample, dir string) {
			run(t, dir, "reset", "--quiet", "--hard", "base")
			run(t, dir, "cherry-pick", "opened", "opened~1")
		}, "file names are the order"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSample(t)
			dir := s.open(t, s.queue(t))
			c.edit(t, s, dir)
			before := s.queue(t)
			_, err := s.repo.Save(s.u, dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v does not say %q", err, c.want)
			}
			for i, p := range s.queue(t) {
				if string(p.Raw) != string(before[i].Raw) {
					t.Errorf("%s was changed by a refused save", p.Name)
				}
			}
		})
	}
}

func TestSaveLeavesOthersPatchesAlone(t *testing.T) {
	s := newSample(t)
	dir := s.open(t, s.queue(t))
	name := filepath.Join(s.repo.Queue(s.u), "0010-pkg-ask-a-hook.patch")
	put(t, name, strings.Replace(get(t, name), "Why it is needed.", "Why it is really needed.", 1))
	put(t, filepath.Join(dir, "pkg", "new.go"), "package pkg\n")
	commit(t, dir, "pkg: add a file"+header)
	saved, err := s.repo.Save(s.u, dir)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(saved.Written, " ") != "0030-pkg-add-a-file.patch" || !strings.Contains(get(t, name), "really") {
		t.Fatalf("saved %+v", saved)
	}
}

func TestCheckApply(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(t *testing.T, s sample)
		want string
	}{
		{"in order", func(*testing.T, sample) {}, ""},
		{"file moved on upstream", func(t *testing.T, s sample) {
			name := filepath.Join(s.tree.Mounts[0].Dir, "pkg", "a.go")
			put(t, name, "// Copyright.\n\n"+get(t, name))
		}, "offset 2 lines"},
		{"context changed upstream", func(t *testing.T, s sample) {
			name := filepath.Join(s.tree.Mounts[0].Dir, "pkg", "a.go")
			put(t, name, strings.Replace(get(t, name), "return 1", "return 3", 1))
		}, "does not apply"},
		{"upstream took it", func(t *testing.T, s sample) {
			put(t, filepath.Join(s.tree.Mounts[1].Dir, "types.go"), "package api\n\ntype T struct{ Name string }\n")
		}, "does not apply"},
		{"wrong hash", func(t *testing.T, s sample) {
			name := filepath.Join(s.repo.Queue(s.u), "0020-api-add-a-name.patch")
			p, err := ParsePatch("0020-api-add-a-name.patch", []byte(get(t, name)))
			if err != nil {
				t.Fatal(err)
			}
			i := strings.Index(string(p.Raw), "\nindex ")
			put(t, name, string(p.Raw[:i+7])+strings.Repeat("0", 40)+string(p.Raw[i+47:]))
		}, "run make patch-refresh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSample(t)
			c.edit(t, s)
			faults, _, err := checkApply(s.tree, s.queue(t))
			if err != nil {
				t.Fatal(err)
			}
			all := strings.Join(faults, "\n")
			if c.want == "" && all != "" || !strings.Contains(all, c.want) {
				t.Fatalf("faults %q, want %q", all, c.want)
			}
		})
	}
}

func TestIsDead(t *testing.T) {
	s := newSample(t)
	p := s.queue(t)[1]
	dead, err := isDead(s.tree, p)
	if err != nil || dead {
		t.Fatalf("dead %v, error %v", dead, err)
	}
	put(t, filepath.Join(s.tree.Mounts[1].Dir, "types.go"), "package api\n\ntype T struct{ Name string }\n")
	if dead, err = isDead(s.tree, p); err != nil || !dead {
		t.Fatalf("dead %v, error %v", dead, err)
	}
}

func TestHooks(t *testing.T) {
	const setsIt = "package inject\n\nimport \"example.org/up/pkg\"\n\nfunc init() { pkg.Hook = func() {} }\n"
	for _, c := range []struct{ name, code, want string }{
		{"set", setsIt, ""},
		{"set under another name", strings.NewReplacer(`"example.org/up/pkg"`, `up "example.org/up/pkg"`, "pkg.Hook", "up.Hook").Replace(setsIt), ""},
		{"set once through a method", strings.Replace(setsIt, "pkg.Hook = func() {}", "pkg.Hook.Set(nil)", 1), ""},
		{"not set", "package inject\n", "Hook is declared but nothing of ours sets it"},
		{"only called", strings.Replace(setsIt, "pkg.Hook = func() {}", "pkg.Hook()", 1), "Hook is declared but nothing of ours sets it"},
		{"other name", strings.Replace(setsIt, "pkg.Hook ", "pkg.Gone ", 1), "pkg.Gone, which neither upstream nor a patch declares"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSample(t)
			put(t, filepath.Join(s.repo.Root, "kubelet", "inject", "inject.go"), c.code)
			patches := s.queue(t)
			overlay, _, err := PatchOverlay(s.tree, patches)
			if err != nil {
				t.Fatal(err)
			}
			h := newHooks()
			if err := h.declare(s.tree, patches, overlay); err != nil {
				t.Fatal(err)
			}
			if err := h.use(s.repo.Root); err != nil {
				t.Fatal(err)
			}
			faults := strings.Join(h.faults(s.u), "\n")
			if c.want == "" && faults != "" || !strings.Contains(faults, c.want) {
				t.Fatalf("faults %q, want %q", faults, c.want)
			}
		})
	}
}

func TestSyncTouchesOnlyDifferences(t *testing.T) {
	s := newSample(t)
	src := s.repo.Src(s.u)
	if err := s.repo.fill(s.tree); err != nil {
		t.Fatal(err)
	}
	overlay, _, err := PatchOverlay(s.tree, s.queue(t))
	if err != nil {
		t.Fatal(err)
	}
	steps := []struct {
		name    string
		overlay Overlay
		changed int
	}{
		{"patches arrive", overlay, 3},
		{"nothing new", overlay, 0},
		{"one leaves", Overlay{"pkg/a.go": overlay["pkg/a.go"], "pkg/hooks_a.go": overlay["pkg/hooks_a.go"]}, 1},
		{"a file is deleted", Overlay{"pkg/a.go": nil}, 2},
		{"all leave", Overlay{}, 1},
	}
	for _, step := range steps {
		changed, err := s.repo.sync(s.tree, step.overlay)
		if err != nil {
			t.Fatal(err)
		}
		if changed != step.changed {
			t.Errorf("%s: %d files changed, want %d", step.name, changed, step.changed)
		}
	}
	for _, name := range []string{"pkg/a.go", "staging/example.org/api/types.go", "pkg/crlf.txt"} {
		pristine, err := readPristine(s.tree, name)
		if err != nil {
			t.Fatal(err)
		}
		if got := get(t, filepath.Join(src, name)); got != string(pristine) {
			t.Errorf("%s is %q, want pristine", name, got)
		}
	}
	if _, err := os.Stat(filepath.Join(src, "pkg", "hooks_a.go")); !os.IsNotExist(err) {
		t.Errorf("a file of a patch that left is still there: %v", err)
	}
}

func TestReplaceModules(t *testing.T) {
	in := "module podmig.dev/podmig\n\ngo 1.26\n\nrequire example.org/up v1.0.0\n\nreplace example.org/api => example.org/api v0.1.0\n"
	s := newSample(t)
	modules := map[string]string{}
	s.tree.addReplaces(modules, Overlay{"pkg/a.go": nil, "staging/example.org/api/types.go": nil}, s.repo.Src(s.u), s.repo.Root)
	out, err := replaceModules([]byte(in), modules)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"replace example.org/up => ./.build/src/kubernetes\n",
		"replace example.org/api => ./.build/src/kubernetes/staging/example.org/api\n",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("module file lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(string(out), "v0.1.0") {
		t.Errorf("the old replacement is still there:\n%s", out)
	}
}

func TestTestPattern(t *testing.T) {
	s := newSample(t)
	for _, c := range []struct{ name, word, want string }{
		{"import path", "example.org/up/pkg", "example.org/up/pkg"},
		{"everything below", "example.org/up/pkg/...", "example.org/up/pkg/..."},
		{"folder of the tree", "./pkg/", "example.org/up/pkg"},
		{"folder of a staging module", "./staging/example.org/api", "example.org/api"},
		{"everything below a folder", "./pkg/...", "example.org/up/pkg/..."},
		{"somebody else's", "example.com/x", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := s.tree.testPattern(c.word)
			if (err != nil) != (c.want == "") || got != c.want {
				t.Fatalf("got %q, %v; want %q", got, err, c.want)
			}
		})
	}
	if !coveredByOther("a/b/c", map[string]bool{"a/...": true}) || coveredByOther("a/...", map[string]bool{"a/...": true}) {
		t.Error("patterns with dots do not cover what is below, or cover themselves")
	}
}
