package patchq

import (
	"maps"
	"path/filepath"
	"strings"
	"testing"
)

func TestGeneratedFile(t *testing.T) {
	for _, c := range []struct {
		name      string
		generated bool
	}{
		{"staging/src/k8s.io/api/core/v1/generated.pb.go", true},
		{"staging/src/k8s.io/api/core/v1/generated.proto", true},
		{"staging/src/k8s.io/api/core/v1/types_swagger_doc_generated.go", true},
		{"staging/src/k8s.io/api/core/v1/types.go", false},
		{"pkg/generated/openapi/zz_generated.openapi.go", true},
		{"staging/src/k8s.io/client-go/applyconfigurations/core/v1/podspec.go", true},
		{"staging/src/k8s.io/client-go/rest/client.go", false},
		{"pkg/kubelet/kubelet.go", false},
	} {
		if got := generatedFile.MatchString(c.name); got != c.generated {
			t.Errorf("%s counts as generated: %v, want %v", c.name, got, c.generated)
		}
	}
}

func TestGenerateOnlyForAPITypes(t *testing.T) {
	s := newSample(t)
	o, err := s.repo.generate(s.tree, Overlay{"pkg/a.go": []byte("x"), "staging/src/k8s.io/api/core/v1/doc.go": []byte("x")})
	if err != nil || len(o) != 0 {
		t.Fatalf("generated %v, error %v", o.Paths(), err)
	}
}

func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "abc")
	if _, err := readStore(dir); err == nil {
		t.Fatal("a store that is not there was read")
	}
	want := Overlay{"a/b.go": []byte("one"), "c.proto": []byte("two")}
	if err := writeStore(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := readStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.EqualFunc(got, want, func(a, b []byte) bool { return string(a) == string(b) }) {
		t.Fatalf("got %v", got.Paths())
	}
}

func TestCollect(t *testing.T) {
	const pb, types = "staging/example.org/api/generated.pb.go", "staging/example.org/api/types.go"
	for _, c := range []struct {
		name  string
		write map[string]string
		want  string
		files string
	}{
		{"a generated file changes", map[string]string{pb: "package api\n"}, "", pb},
		{"other files do not count", map[string]string{pb: "package api\n", "pkg/a.go": "package pkg\n"}, "", pb},
		{"nothing changes", nil, "no generator wrote anything", ""},
		{"a patched file changes", map[string]string{types: "package api\n"}, "the generators rewrite " + types, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSample(t)
			g := generation{repo: s.repo, tree: s.tree, dir: t.TempDir()}
			if err := s.tree.CopyTo(g.dir); err != nil {
				t.Fatal(err)
			}
			patched := Overlay{types: []byte("package api\n\ntype T struct{ Name string }\n")}
			put(t, filepath.Join(g.dir, types), string(patched[types]))
			for name, text := range c.write {
				put(t, filepath.Join(g.dir, name), text)
			}
			o, err := g.collect(patched)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
			if got := strings.Join(o.Paths(), " "); got != c.files {
				t.Fatalf("collected %q, want %q", got, c.files)
			}
		})
	}
}
