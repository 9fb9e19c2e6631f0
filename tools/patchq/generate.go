package patchq

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"go/format"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strings"
	"time"
)

// generateTimeout bounds one generator, including the time to compile it.
const generateTimeout = 15 * time.Minute

// generators are upstream's own programs, pinned by our go.mod, that a change of an API type needs. Deep copy and
// conversion are not among them: PodSpec is converted by casting the whole struct and a string is copied with it, so
// their output would not change.
var generators = []string{
	"golang.org/x/tools/cmd/goimports",
	"k8s.io/code-generator/cmd/applyconfiguration-gen",
	"k8s.io/code-generator/cmd/go-to-protobuf",
	"k8s.io/code-generator/cmd/go-to-protobuf/protoc-gen-gogo",
	"k8s.io/kube-openapi/cmd/openapi-gen",
	"k8s.io/kubernetes/cmd/genswaggertypedocs",
}

// generatorsRevision is counted up when the way the generators are called changes.
const generatorsRevision = "1"

func generatorsID() string {
	return generatorsRevision + " " + runtime.Version() + " " + strings.Join(generators, " ")
}

// apiTypes matches the files whose change makes generated code stale.
var apiTypes = regexp.MustCompile(`^staging/src/(k8s\.io/api/.+)/types\.go$`)

// generatedFile matches what the generators may write.
var generatedFile = regexp.MustCompile(`(^|/)(generated\.pb\.go|generated\.proto|types_swagger_doc_generated\.go|` +
	`zz_generated\.model_name\.go)$|^pkg/generated/openapi/|^staging/src/k8s\.io/client-go/applyconfigurations/`)

// generate returns the generated files that differ from pristine because of the patches. Results are kept by the hash
// of their inputs, so a queue that changes elsewhere costs nothing.
func (r Repo) generate(t Tree, patched Overlay) (Overlay, error) {
	var packages []string
	for _, p := range patched.Paths() {
		if m := apiTypes.FindStringSubmatch(p); m != nil {
			packages = append(packages, m[1])
		}
	}
	if len(packages) == 0 {
		return Overlay{}, nil
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n", generatorsID(), t.ID())
	for _, p := range patched.Paths() {
		if strings.HasPrefix(p, t.Upstream.Staging+"/") {
			fmt.Fprintf(h, "%s %d\n", p, len(patched[p]))
			h.Write(patched[p])
		}
	}
	base := filepath.Join(r.Root, ".build", "gen")
	store := filepath.Join(base, hex.EncodeToString(h.Sum(nil))[:20])
	if o, err := readStore(store); err == nil {
		return o, nil
	}

	r.logf("  an API type changed: running upstream's code generators, about a minute")
	if err := os.RemoveAll(base); err != nil {
		return nil, fmt.Errorf("clear generator folder: %w", err)
	}
	run := generation{repo: r, tree: t, base: base, dir: filepath.Join(base, "tree"), packages: packages}
	defer os.RemoveAll(run.dir)
	if err := t.CopyTo(run.dir); err != nil {
		return nil, err
	}
	for p, raw := range patched {
		name := filepath.Join(run.dir, filepath.FromSlash(p))
		if raw == nil {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("remove patched file: %w", err)
			}
			continue
		}
		if err := writeFile(name, raw); err != nil {
			return nil, err
		}
	}
	for _, s := range []struct {
		name string
		run  func() error
	}{
		{"compile generators", run.compile},
		{"protobuf", run.protobuf},
		{"API documentation", run.swagger},
		{"OpenAPI", run.openapi},
		{"apply configurations", run.applyConfigurations},
	} {
		start := time.Now()
		if err := s.run(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		r.logf("  generate %s (%.1fs)", s.name, time.Since(start).Seconds())
	}
	o, err := run.collect(patched)
	if err != nil {
		return nil, err
	}
	return o, writeStore(store, o)
}

// generation is one run of the generators. They work in a full copy of the tree of their own, because some of them
// delete files beside the packages they read, and those must never be the module cache's.
type generation struct {
	repo     Repo
	tree     Tree
	base     string
	dir      string
	packages []string
}

// cmd prepares a command in a folder whose go.mod makes every module of the tree local. A module file in the current
// folder is used rather than -modfile, because some generators call the Go tool in ways that refuse that flag.
func (g generation) cmd(name string, args ...string) (*exec.Cmd, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), generateTimeout)
	if p := filepath.Join(g.base, "bin", name); fileExists(p) {
		name = p
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = g.base
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod", "GO111MODULE=on",
		"PATH="+filepath.Join(g.base, "bin")+string(os.PathListSeparator)+os.Getenv("PATH"))
	return cmd, cancel
}

func (g generation) run(name string, args ...string) ([]byte, error) {
	cmd, cancel := g.cmd(name, args...)
	defer cancel()
	return output(cmd)
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// compile builds the generators from the versions our go.mod pins and writes the module file of the scratch tree.
func (g generation) compile() error {
	if _, err := exec.LookPath("protoc"); err != nil {
		return errors.New("protoc is missing: run make deps, or install the package protobuf-compiler")
	}
	bin := filepath.Join(g.base, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return fmt.Errorf("make generator folder: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), generateTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-o", bin + string(filepath.Separator)}, generators...)...)
	cmd.Dir = g.repo.Root
	if _, err := output(cmd); err != nil {
		return err
	}

	raw, err := os.ReadFile(filepath.Join(g.repo.Root, "go.mod"))
	if err != nil {
		return fmt.Errorf("read module file: %w", err)
	}
	local := map[string]string{}
	for _, m := range g.tree.Mounts {
		local[m.Module] = "./" + path.Join("tree", m.At)
	}
	out, err := replaceModules(raw, local)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(g.base, "go.mod"), out); err != nil {
		return err
	}
	sum, err := os.ReadFile(filepath.Join(g.repo.Root, "go.sum"))
	if err != nil {
		return fmt.Errorf("read module sums: %w", err)
	}
	return writeFile(filepath.Join(g.base, "go.sum"), sum)
}

func (g generation) staging() string {
	return filepath.Join(g.dir, filepath.FromSlash(g.tree.Upstream.Staging))
}

func (g generation) boilerplate() string {
	return filepath.Join(g.dir, "hack", "boilerplate", "boilerplate.generatego.txt")
}

func (g generation) protobuf() error {
	// The generated .proto imports gogo.proto by its module path.
	module, err := g.moduleDir("github.com/gogo/protobuf")
	if err != nil {
		return err
	}
	gogo, err := os.ReadFile(filepath.Join(module, "gogoproto", "gogo.proto"))
	if err != nil {
		return fmt.Errorf("read gogo.proto: %w", err)
	}
	include := filepath.Join(g.base, "include")
	if err := writeFile(filepath.Join(include, "github.com", "gogo", "protobuf", "gogoproto", "gogo.proto"), gogo); err != nil {
		return err
	}
	// The minus sign: needed for their types, not to be written.
	var machinery []string
	for _, p := range []string{"util/intstr", "api/resource", "runtime/schema", "runtime", "apis/meta/v1", "apis/meta/v1beta1"} {
		machinery = append(machinery, "-k8s.io/apimachinery/pkg/"+p)
	}
	_, err = g.run("go-to-protobuf",
		"--go-header-file", g.boilerplate(),
		"--output-dir", g.staging(),
		"--proto-import", g.staging(),
		"--proto-import", include,
		"--proto-import", filepath.Join(g.dir, "third_party", "protobuf"),
		"--apimachinery-packages", strings.Join(machinery, ","),
		"--packages", strings.Join(g.packages, ","))
	return err
}

func (g generation) moduleDir(module string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), generateTimeout)
	defer cancel()
	version, err := g.repo.RequiredVersion(module)
	if err != nil {
		return "", err
	}
	// Nothing of it is compiled, so the plain listing would not fetch its archive.
	cmd := exec.CommandContext(ctx, "go", "mod", "download", module+"@"+version)
	cmd.Dir = g.repo.Root
	if _, err := output(cmd); err != nil {
		return "", err
	}
	cmd = exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module)
	cmd.Dir = g.repo.Root
	out, err := output(cmd)
	return strings.TrimSpace(string(out)), err
}

// Marks in upstream's file of documentation strings; what lies between is generated.
const (
	swaggerStart = "// AUTO-GENERATED FUNCTIONS START HERE. DO NOT EDIT.\n"
	swaggerEnd   = "// AUTO-GENERATED FUNCTIONS END HERE\n"
)

func (g generation) swagger() error {
	for _, p := range g.packages {
		dir := filepath.Join(g.staging(), filepath.FromSlash(p))
		name := filepath.Join(dir, "types_swagger_doc_generated.go")
		old, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("read documentation strings: %w", err)
		}
		// The introduction is upstream's; only the generated part is replaced.
		at := bytes.Index(old, []byte(swaggerStart))
		if at < 0 {
			return fmt.Errorf("%s: the line %q is gone: look how hack/update-codegen.sh writes this file now", name, strings.TrimSpace(swaggerStart))
		}
		out, err := g.run("genswaggertypedocs", "-s", filepath.Join(dir, "types.go"), "-f", "-")
		if err != nil {
			return err
		}
		text := append(bytes.Clone(old[:at+len(swaggerStart)]), out...)
		formatted, err := format.Source(append(text, []byte(swaggerEnd)...))
		if err != nil {
			return fmt.Errorf("format documentation strings: %w", err)
		}
		if err := writeFile(name, formatted); err != nil {
			return err
		}
	}
	return nil
}

var (
	anyTag     = regexp.MustCompile(`(?m)^// *\+k8s:`)
	openapiTag = []byte("+k8s:openapi")
)

func (g generation) openapi() error {
	// Upstream chooses the packages by their tags, too.
	dirs := map[string]bool{}
	err := filepath.WalkDir(g.dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch d.Name() {
			case "testdata", "code-generator", "sample-apiserver", "sample-controller":
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(name) != ".go" {
			return nil
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if bytes.Contains(raw, openapiTag) && anyTag.Match(raw) {
			dirs[filepath.Dir(name)] = true
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look for tagged packages: %w", err)
	}
	var packages []string
	for d := range dirs {
		rel, err := filepath.Rel(g.dir, d)
		if err != nil {
			return fmt.Errorf("name package: %w", err)
		}
		rel = filepath.ToSlash(rel)
		if p, ok := strings.CutPrefix(rel, g.tree.Upstream.Staging+"/"); ok {
			packages = append(packages, p)
		} else {
			packages = append(packages, path.Join(g.tree.Upstream.Module, rel))
		}
	}
	sort.Strings(packages)
	report := filepath.Join(g.base, "api_violations.report")
	if _, err := g.run("openapi-gen", append([]string{
		"--go-header-file", g.boilerplate(),
		"--output-file", "zz_generated.openapi.go",
		"--output-dir", filepath.Join(g.dir, "pkg", "generated", "openapi"),
		"--output-pkg", g.tree.Upstream.Module + "/pkg/generated/openapi",
		"--output-model-name-file", "zz_generated.model_name.go",
		"--report-filename", report,
	}, packages...)...); err != nil {
		return err
	}
	found, err := os.ReadFile(report)
	if err != nil {
		return fmt.Errorf("read API rule report: %w", err)
	}
	known, err := os.ReadFile(filepath.Join(g.dir, "api", "api-rules", "violation_exceptions.list"))
	if err != nil {
		return fmt.Errorf("read known API rule violations: %w", err)
	}
	if !bytes.Equal(found, known) {
		return errors.New("a patch breaks an API rule that upstream keeps: compare .build/gen/api_violations.report " +
			"with api/api-rules/violation_exceptions.list of the tree")
	}
	return nil
}

func (g generation) applyConfigurations() error {
	// The schema comes out of the OpenAPI code written one step before.
	if _, err := g.run("go", "build", "-trimpath", "-o", filepath.Join(g.base, "bin", "models-schema"),
		g.tree.Upstream.Module+"/pkg/generated/openapi/cmd/models-schema"); err != nil {
		return err
	}
	schema, err := g.run("models-schema")
	if err != nil {
		return err
	}
	schemaFile := filepath.Join(g.base, "schema.json")
	if err := writeFile(schemaFile, schema); err != nil {
		return err
	}
	packages := map[string]bool{"k8s.io/apimachinery/pkg/apis/meta/v1": true}
	api := filepath.Join(g.staging(), "k8s.io", "api")
	err = filepath.WalkDir(api, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "types.go" {
			rel, relErr := filepath.Rel(g.staging(), filepath.Dir(name))
			packages[filepath.ToSlash(rel)], err = true, relErr
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("look for API packages: %w", err)
	}
	var names []string
	for p := range packages {
		names = append(names, p)
	}
	sort.Strings(names)
	const pkg = "k8s.io/client-go/applyconfigurations"
	_, err = g.run("applyconfiguration-gen", append([]string{
		"--openapi-schema", schemaFile,
		"--go-header-file", g.boilerplate(),
		"--output-dir", filepath.Join(g.staging(), filepath.FromSlash(pkg)),
		"--output-pkg", pkg,
	}, names...)...)
	return err
}

// collect finds what the generators changed.
func (g generation) collect(patched Overlay) (Overlay, error) {
	for p, raw := range patched {
		if raw == nil {
			continue
		}
		now, err := os.ReadFile(filepath.Join(g.dir, filepath.FromSlash(p)))
		if err != nil {
			return nil, fmt.Errorf("read generated tree: %w", err)
		}
		if !bytes.Equal(raw, now) {
			return nil, fmt.Errorf("the generators rewrite %s: give the field the tags they want, or leave generated files out of the patch", p)
		}
	}
	o := Overlay{}
	err := filepath.WalkDir(g.dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(g.dir, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if _, ok := patched[rel]; ok || !generatedFile.MatchString(rel) {
			return nil
		}
		now, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		old, err := readPristine(g.tree, rel)
		if err != nil {
			return err
		}
		if old == nil || !bytes.Equal(old, now) {
			o[rel] = now
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("collect generated files: %w", err)
	}
	if len(o) == 0 {
		return nil, errors.New("an API type changed but no generator wrote anything: look at its tags")
	}
	return o, nil
}

// readStore reads the kept result of an earlier run.
func readStore(dir string) (Overlay, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	o := Overlay{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		o[filepath.ToSlash(rel)], err = os.ReadFile(name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read kept generated files: %w", err)
	}
	return o, nil
}

// writeStore keeps a result; it appears under its name only when complete.
func writeStore(dir string, o Overlay) error {
	tmp := dir + ".tmp"
	for p, raw := range o {
		if err := writeFile(filepath.Join(tmp, filepath.FromSlash(p)), raw); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return fmt.Errorf("keep generated files: %w", err)
	}
	return nil
}
