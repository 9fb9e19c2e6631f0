package build

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func put(t *testing.T, root, name, text string) {
	t.Helper()
	name = filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

var sampleVersions = map[string]versions{
	"kubernetes": {text: "v1.37.1+podmig.9", time: "2026-01-01T00:00:00Z", revision: "aaa"},
	"containerd": {text: "v2.4.2+podmig.1", revision: "bbb"},
	"runc":       {text: "v1.5.2+podmig.0", revision: "ccc"},
	"cni":        {text: "v1.9.1"},
}

func TestPlan(t *testing.T) {
	root := t.TempDir()
	put(t, root, "kubelet/cmd/kubelet/main.go", "package main\n")
	put(t, root, "tools/cmd/migration-bench/main.go", "package main\n")
	put(t, root, "tools/cmd/patchq/main.go", "package main\n")
	put(t, root, "tools/cmd/empty/README.md", "")
	put(t, root, "cluster-setup/images/cmd/counter/main.go", "package main\n")
	put(t, root, "cluster-setup/other/cmd/apart/main.go", "package main\n")
	put(t, root, "cluster-setup/other/cmd/apart/go.mod", "module apart\n")
	put(t, root, "cluster-setup/dns/main.go", "package main\n")
	put(t, root, ".build/src/cmd/x/main.go", "package main\n")
	steps, err := plan(root, sampleVersions)
	if err != nil {
		t.Fatal(err)
	}
	packages := map[string]string{}
	var names, binaries []string
	for _, s := range steps {
		names = append(names, s.name)
		binaries = append(binaries, s.binaries...)
		for i, b := range s.binaries {
			packages[b] = s.packages[i]
		}
	}
	if got := strings.Join(names, " "); got != "podmig containerd kubernetes cni etcd runc coredns faults" {
		t.Errorf("steps are %q", got)
	}
	for binary, want := range map[string]string{
		"kubelet":        "./kubelet/cmd/kubelet",
		"faults/kubelet": "./kubelet/cmd/kubelet",
		// Upstream's as long as there is none of ours.
		"kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
		"containerd":              "github.com/containerd/containerd/v2/cmd/containerd",
		"kube-apiserver":          "k8s.io/kubernetes/cmd/kube-apiserver",
		"etcd":                    "go.etcd.io/etcd/server/v3",
		"cni/bridge":              "github.com/containernetworking/plugins/plugins/main/bridge",
		"migration-bench":         "./tools/cmd/migration-bench",
		"counter":                 "./cluster-setup/images/cmd/counter",
		"coredns":                 ".",
	} {
		if packages[binary] != want {
			t.Errorf("%s is built from %q, want %q", binary, packages[binary], want)
		}
	}
	for _, not := range []string{"patchq", "empty", "apart", "x"} {
		if slices.Contains(binaries, not) {
			t.Errorf("%s is installed", not)
		}
	}
	seen := map[string]bool{}
	for _, b := range binaries {
		if seen[b] {
			t.Errorf("%s is built twice", b)
		}
		seen[b] = true
	}
}

func TestPlanStampsVersions(t *testing.T) {
	root := t.TempDir()
	put(t, root, "kubelet/cmd/kubelet/main.go", "package main\n")
	steps, err := plan(root, sampleVersions)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ step, want string }{
		{"kubernetes", "-X k8s.io/component-base/version.gitVersion=v1.37.1+podmig.9"},
		{"kubernetes", "-X k8s.io/component-base/version.gitMinor=37"},
		{"kubernetes", "-X k8s.io/component-base/version.buildDate=2026-01-01T00:00:00Z"},
		{"faults", "-tags=podmig_patched,podmig_faults"},
		{"faults", "-X k8s.io/component-base/version.gitVersion=v1.37.1+podmig.9"},
		{"containerd", "-X github.com/containerd/containerd/v2/version.Version=v2.4.2+podmig.1"},
		{"containerd", "-X github.com/containerd/containerd/v2/version.Revision=bbb"},
		{"runc", "-X main.extraVersion=+podmig.0"},
		{"cni", "buildversion.BuildVersion=v1.9.1"},
	} {
		i := slices.IndexFunc(steps, func(s step) bool { return s.name == c.step })
		if i < 0 {
			t.Fatalf("no step %s", c.step)
		}
		if args := strings.Join(steps[i].args, " "); !strings.Contains(args, c.want) {
			t.Errorf("%s lacks %q: %s", c.step, c.want, args)
		}
	}
	if slices.ContainsFunc(steps, func(s step) bool { return s.name == "podmig" || s.name == "coredns" }) {
		t.Error("a step without programs is planned")
	}
}

func TestUpToDate(t *testing.T) {
	root := t.TempDir()
	put(t, root, ".build/bin/kubelet", "x")
	put(t, root, ".build/bin/cni/bridge", "x")
	for _, c := range []struct {
		name, stamp string
		want        bool
	}{
		{"same", "abc\nkubelet\ncni/bridge\n", true},
		{"other sources", "abd\nkubelet\n", false},
		{"binary gone", "abc\nkubelet\netcd\n", false},
		{"empty stamp", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := upToDate(root, "abc", c.stamp); got != c.want {
				t.Fatalf("up to date is %v, want %v", got, c.want)
			}
		})
	}
}

func TestHashSources(t *testing.T) {
	root := t.TempDir()
	put(t, root, ".build/src/.stamp", "1")
	put(t, root, "kubelet/a.go", "package a\n")
	hash := func() string {
		t.Helper()
		h, err := hashSources(root)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	last := hash()
	for _, c := range []struct {
		name, file, text string
		changes          bool
	}{
		{"same content again", "kubelet/a.go", "package a\n", false},
		{"a test", "kubelet/a_test.go", "package a\n", false},
		{"test data", "kubelet/testdata/x.txt", "x", false},
		{"a page", "kubelet/README.md", "x", false},
		{"code", "kubelet/a.go", "package a // changed\n", true},
		{"an embedded file", "cluster-setup/manifests/x.yaml", "x", true},
		{"the patched sources", ".build/src/.stamp", "2", true},
	} {
		put(t, root, c.file, c.text)
		now := hash()
		if (now != last) != c.changes {
			t.Errorf("%s: hash changed is %v, want %v", c.name, now != last, c.changes)
		}
		last = now
	}
}

func TestRemoveStrangers(t *testing.T) {
	root := t.TempDir()
	for _, n := range []string{"kubelet", "old", "cni/bridge", "cni/old"} {
		put(t, root, n, "x")
	}
	if err := removeStrangers(root, []string{"kubelet", "cni/bridge"}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"kubelet": true, "old": false, "cni/bridge": true, "cni/old": false} {
		if _, err := os.Stat(filepath.Join(root, name)); (err == nil) != want {
			t.Errorf("%s exists is %v, want %v", name, err == nil, want)
		}
	}
}

// TestStepRun compiles a program of the standard library alone, and one that does not compile.
func TestStepRun(t *testing.T) {
	root := t.TempDir()
	put(t, root, "go.mod", "module example.org/x\n\ngo 1.26\n")
	put(t, root, "good/main.go", "package main\n\nvar version string\n\nfunc main() { print(version) }\n")
	put(t, root, "bad/main.go", "package main\n\nfunc main() { undefined() }\n")
	if err := os.MkdirAll(filepath.Join(root, ".build", "log"), 0o755); err != nil {
		t.Fatal(err)
	}
	good := step{name: "good", packages: []string{"./good"}, rename: "renamed", binaries: []string{"renamed"}}
	if err := good.run(context.Background(), root, io.Discard); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, ".build", "bin", "renamed")); err != nil {
		t.Error(err)
	}
	bad := step{name: "bad", packages: []string{"./bad"}}
	err := bad.run(context.Background(), root, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "undefined: undefined") || !strings.Contains(err.Error(), ".build/log/build-bad.log") {
		t.Errorf("error %v does not show the compiler's words and the log", err)
	}
}
