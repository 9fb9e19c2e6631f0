package patchq

import (
	"strings"
	"testing"
)

const goodPatch = `From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: podmig <patches@podmig.dev>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] kubelet: ask a hook before a pod is killed, which is a
 subject that folds

A pod that is being moved must not be killed.

Patch-Class: hook
Upstream: none yet
Drop-When: upstream asks somebody
Used-By: kubelet/inject
Tests: ./pkg/kubelet/
 ./pkg/kubelet/server/
---
 a.go       | 3 ++-
 hooks_a.go | 3 +++
 2 files changed, 5 insertions(+), 1 deletion(-)

diff --git a/a.go b/a.go
index 0000000000000000000000000000000000000000..0000000000000000000000000000000000000001 100644
--- a/a.go
+++ b/a.go
@@ -1,3 +1,4 @@
 package a

-func f() {}
+func f() { Hook() }
+--- not a header
diff --git a/hooks_a.go b/hooks_a.go
new file mode 100644
index 0000000000000000000000000000000000000000..0000000000000000000000000000000000000001
--- /dev/null
+++ b/hooks_a.go
@@ -0,0 +1,3 @@
+package a
+
+var Hook = func() {}
`

func TestParsePatch(t *testing.T) {
	// Editors strip the space of an empty context line; git reads it all the same.
	p, err := ParsePatch("0010-kubelet-ask.patch", []byte(goodPatch))
	if err != nil {
		t.Fatal(err)
	}
	if want := "kubelet: ask a hook before a pod is killed, which is a subject that folds"; p.Subject != want {
		t.Errorf("subject is %q, want %q", p.Subject, want)
	}
	if want := "A pod that is being moved must not be killed."; p.Body != want {
		t.Errorf("body is %q, want %q", p.Body, want)
	}
	if want := "./pkg/kubelet/ ./pkg/kubelet/server/"; p.Trailers["Tests"] != want {
		t.Errorf("Tests is %q, want %q", p.Trailers["Tests"], want)
	}
	if len(p.Files) != 2 || p.Files[0].New || !p.Files[1].New {
		t.Fatalf("files are %+v", p.Files)
	}
	if f := p.Files[0]; f.Added != 2 || f.Removed != 1 {
		t.Errorf("a.go has +%d -%d, want +2 -1", f.Added, f.Removed)
	}
	if lines, files := p.Footprint(); lines != 2 || files != 1 {
		t.Errorf("footprint is %d lines in %d files, want 2 in 1", lines, files)
	}
}

func TestParsePatchRefuses(t *testing.T) {
	for _, c := range []struct{ name, patch, want string }{
		{"no change", strings.Split(goodPatch, "diff --git")[0], "changes no file"},
		{"rename", strings.Replace(goodPatch, "a/a.go b/a.go", "a/a.go b/b.go", 1), "renames a.go"},
		{"short hunk", strings.Replace(goodPatch, "+1,4", "+1,9", 1), "hunk ends early"},
		{"cut off", goodPatch[:strings.Index(goodPatch, "+var Hook")], "hunk ends early"},
		{"field twice", strings.Replace(goodPatch, "Upstream: none yet", "Upstream: none yet\nUpstream: none", 1), "Upstream appears twice"},
		{"binary", strings.Replace(goodPatch, "--- /dev/null", "GIT binary patch\n--- /dev/null", 1), "binary change"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParsePatch("0010-x.patch", []byte(c.patch))
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %q does not say %q", err, c.want)
			}
		})
	}
}

func TestLint(t *testing.T) {
	replace := func(old, now string) string {
		if !strings.Contains(goodPatch, old) {
			t.Fatalf("the sample does not contain %q", old)
		}
		return strings.Replace(goodPatch, old, now, 1)
	}
	many := "@@ -1,3 +1,14 @@\n" + strings.Repeat("+x()\n", 11)
	for _, c := range []struct {
		name, file, patch string
		want              string
	}{
		{"in order", "", goodPatch, ""},
		{"no class", "", replace("Patch-Class: hook\n", ""), "Patch-Class is missing"},
		{"unknown class", "", replace("Patch-Class: hook", "Patch-Class: feature"), `"feature" is none of`},
		{"no tests", "", replace("Tests: ./pkg/kubelet/\n ./pkg/kubelet/server/\n", ""), "Tests is missing"},
		{"no reason", "", replace("A pod that is being moved must not be killed.\n\n", ""), "does not say why"},
		{"bad subject", "", replace("kubelet: ask", "Ask"), "not of the form"},
		{"white space", "", replace("+package a\n+\n", "+package a\n+ \n"), "ends in white space"},
		{"our module", "", replace("+package a\n+\n", "+package a\n+import _ \"podmig.dev/podmig/kubelet\"\n"), "names our module"},
		{"odd number", "0011-kubelet-ask.patch", goodPatch, "numbers are tens"},
		{"too much", "", replace("@@ -1,3 +1,4 @@\n", many), "the budget is 10 in 3"},
		{"too much with a reason", "", strings.Replace(replace("@@ -1,3 +1,4 @@\n", many), "Upstream: none yet",
			"Upstream: none yet\nOver-Budget: the field needs its documentation", 1), ""},
		{"empty reason", "", replace("Upstream: none yet", "Upstream: none yet\nOver-Budget: yes"), "does not say why"},
		{"generated file by hand", "", strings.ReplaceAll(goodPatch, "hooks_a.go", "generated.pb.go"), "is a generated file"},
		{"hand-written in generated", "", replace("Patch-Class: hook", "Patch-Class: generated"), "is not a generated file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := c.file
			if name == "" {
				name = "0010-kubelet-ask.patch"
			}
			p, err := ParsePatch(name, []byte(c.patch))
			if err != nil {
				t.Fatal(err)
			}
			faults := strings.Join(Lint([]Patch{p}), "\n")
			if c.want == "" && faults != "" {
				t.Fatalf("faults: %s", faults)
			}
			if !strings.Contains(faults, c.want) {
				t.Fatalf("faults %q do not say %q", faults, c.want)
			}
		})
	}
}

func TestLintFindsNumberTwice(t *testing.T) {
	a, err := ParsePatch("0010-kubelet-ask.patch", []byte(goodPatch))
	if err != nil {
		t.Fatal(err)
	}
	b := a
	b.Name = "0010-kubelet-tell.patch"
	if faults := strings.Join(Lint([]Patch{a, b}), "\n"); !strings.Contains(faults, "already used by 0010-kubelet-ask.patch") {
		t.Fatalf("faults: %q", faults)
	}
}
