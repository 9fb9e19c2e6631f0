// Package rules holds the rules that keep the shape of this repository: who may import whom, one comment per package,
// the fixed top level, no traces of the machine it was written on. Its test applies them to the checkout.
//
// It reads import lists and files; it cannot see coupling through data, and it trusts the Go tool for what a package
// imports. A rule whose packages are gone is a failure too, so that none of them dies unnoticed.
package rules

import (
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"
)

// Module is the import path of this repository.
const Module = "podmig.dev/podmig"

// Package is what the rules need to know of one package of ours.
type Package struct {
	// Path is relative to the module.
	Path string
	// Name is the declared name.
	Name string
	// Imports are the full paths of direct imports outside tests; Own paths start with Module.
	Imports []string
}

// Rule says what packages may import, directly or through other packages of ours.
type Rule struct {
	// Packages is a path relative to the module; a trailing /... covers everything below, too.
	Packages string
	// Except takes packages out, in the same form.
	Except []string
	// Own lists the packages of ours that may be imported directly; nil leaves that open.
	Own []string
	// External lists prefixes of import paths outside the standard library that may be imported directly; nil leaves
	// that open.
	External []string
	// Deny lists prefixes that must not be reached at all, also not through other packages of ours.
	Deny []string
	// Why is shown with a violation.
	Why string
}

// none is an empty list that is not nil: nothing may be imported.
var none = []string{}

const (
	kubernetes  = "k8s.io/kubernetes"
	containerd  = "github.com/containerd/containerd"
	nodeKubelet = Module + "/kubelet"
	nodeRuntime = Module + "/containerd-cri"
)

// Imports are the rules of the layout: contracts import nothing, cores import contracts, and only one package per
// upstream imports that upstream.
var Imports = []Rule{
	{
		Packages: "cri-api/migration/v1alpha1", Own: none,
		External: []string{"google.golang.org/grpc", "google.golang.org/protobuf"},
		Why:      "the CRI extension is a contract: both sides import it and it imports neither",
	},
	{
		Packages: "cri-api/...", Except: []string{"cri-api/migration/v1alpha1"}, Own: []string{"cri-api/..."},
		Deny: []string{kubernetes, containerd}, Why: "fake and conformance suite serve any implementation",
	},
	{
		Packages: "kubelet/apis/...", Own: []string{"kubelet/apis/..."}, External: []string{"k8s.io/apimachinery", "k8s.io/api"},
		Why: "API types are imported by everybody, so they import only apimachinery and Kubernetes' own types",
	},
	{
		Packages: "kubelet/migration", Own: none, External: none,
		Deny: []string{"os", "net", "syscall", "log", "context", "time/", "sync", "math/rand"},
		Why:  "the engine is pure: no I/O, no clock, no goroutines; facts come in, effects go out",
	},
	{
		Packages: "kubelet/migration/migrationtest", Own: []string{"kubelet/migration"}, External: none,
		Why: "transcripts need the engine and nothing else",
	},
	{
		Packages: "kubelet/wire", Own: none, External: none,
		Why: "the wire contract is types and bytes: both ends import it",
	},
	{
		Packages: "kubelet/peer", Own: []string{"kubelet/wire"}, External: []string{"k8s.io/klog/v2", "golang.org/x"}, Deny: []string{Module + "/kubelet/migration"},
		Why: "HTTP client and server know the wire contract, not what is decided with it",
	},
	{
		Packages: "kubelet/snapshot", Own: []string{"kubelet/wire", "cri-api/migration/v1alpha1"}, External: []string{"k8s.io/klog/v2"},
		Why: "who serves memory knows as little as possible of where it comes from",
	},
	{
		Packages: "kubelet/journal", Own: []string{"kubelet/migration"}, External: none,
		Why: "the journal stores the engine's records on disk and knows no cluster",
	},
	{
		Packages: "kubelet/deferral", Own: []string{"kubelet/apis/..."}, External: []string{"k8s.io/api"},
		Why: "kubelet, controller manager and controller agree about pods through it, so it is pure",
	},
	{
		Packages: "kubelet/compare", Own: []string{"kubelet/deferral"}, Deny: []string{kubernetes, containerd},
		Why: "comparing two pods is a pure function of two pods",
	},
	{
		Packages: "kubelet/agent", Deny: []string{kubernetes, containerd, nodeRuntime, Module + "/kubelet/inject", Module + "/tools", Module + "/cluster-setup"},
		Why: "the agent carries out effects over interfaces; a Kubernetes rebase must not touch it",
	},
	{
		Packages: "kubelet/...", Except: []string{"kubelet/inject", "kubelet/manager", "kubelet/cmd/..."},
		Deny: []string{kubernetes, containerd, nodeRuntime, Module + "/tools", Module + "/cluster-setup"},
		Why:  "only kubelet/inject, kubelet/manager and the mains import k8s.io/kubernetes",
	},
	{
		Packages: "kubelet/inject", Deny: []string{containerd, nodeRuntime, Module + "/tools", Module + "/cluster-setup"},
		Why: "the two sides of a node meet only in cri-api",
	},
	{
		Packages: "kubelet/manager", Own: []string{"kubelet/deferral", "kubelet/apis/..."},
		Why: "the controller manager needs to know which pods wait, and nothing of how they move",
	},
	{
		Packages: "kubelet/cmd/kube-controller-manager", Own: []string{"kubelet/manager"},
		Why: "the main is upstream's few lines plus one",
	},
	{
		Packages: "kubelet/cmd/kubelet", Own: []string{"kubelet/inject"},
		Why: "the main is upstream's few lines plus one",
	},
	{
		Packages: "containerd-cri/...", Except: []string{"containerd-cri/plugin", "containerd-cri/cmd/...", "containerd-cri/roottest/..."},
		Deny: []string{containerd + "/v2", "github.com/containerd/plugin", kubernetes, nodeKubelet, Module + "/tools", Module + "/cluster-setup"},
		Why:  "only containerd-cri/plugin and containerd's main import containerd's registry",
	},
	{
		Packages: "containerd-cri/checkpoint", Own: []string{"containerd-cri/checkpoint/..."},
		Deny: []string{"google.golang.org/grpc", "k8s.io/"}, Why: "reading hostile archives needs no RPC and no cluster",
	},
	{
		Packages: "containerd-cri/plugin", Deny: []string{kubernetes, nodeKubelet, Module + "/tools", Module + "/cluster-setup"},
		Why: "the two sides of a node meet only in cri-api",
	},
	{
		Packages: "containerd-cri/cmd/containerd", Own: []string{"containerd-cri/plugin"},
		Why: "the main is upstream's few lines plus one",
	},
	{
		Packages: "tools/checkpoint/...", Own: []string{"containerd-cri/checkpoint", "cri-api/migration/v1alpha1", "kubelet/wire", "tools/completion"},
		Deny: []string{kubernetes, containerd}, Why: "who downloads a checkpoint reads its format, which is pure, and nothing else of the node",
	},
	{
		Packages: "tools/cmd/kubectl-checkpoint", Own: []string{"tools/checkpoint"},
		Why: "the main parses nothing: the plugin is one package",
	},
	{
		Packages: "tools/cmd/kubectl_complete-checkpoint", Own: []string{"tools/checkpoint"},
		Why: "the main parses nothing: the plugin is one package",
	},
	{
		Packages: "tools/...", Except: []string{"tools/checkpoint/...", "tools/cmd/kubectl-checkpoint", "tools/cmd/kubectl_complete-checkpoint"},
		Deny: []string{kubernetes, containerd, nodeRuntime, Module + "/kubelet/inject", Module + "/kubelet/agent"},
		Why:  "tools work from outside, through the API",
	},
	{
		Packages: "cluster-setup/...", Except: []string{"cluster-setup/e2e/..."},
		Deny: []string{kubernetes, containerd, nodeRuntime, Module + "/kubelet/inject", Module + "/kubelet/agent", Module + "/kubelet/migration"},
		Why:  "the cluster treats our binaries as files, so it can run upstream's for comparison",
	},
}

// TopLevel lists everything that may be in the root of the repository.
var TopLevel = []string{
	".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "cluster-setup", "containerd-cri", "cri-api", "go.mod", "go.sum",
	"kubelet", "patches", "tools",
}

// matches says whether a path relative to the module falls under a pattern.
func matches(pattern, p string) bool {
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return p == base || strings.HasPrefix(p, base+"/")
	}
	return p == pattern
}

func matchesAny(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return matches(pattern, p) })
}

// own returns the path relative to the module of an import of ours.
func own(imp string) (string, bool) {
	if imp == Module {
		return "", true
	}
	return strings.CutPrefix(imp, Module+"/")
}

// external says whether an import is neither ours nor the standard library's, whose first element has no dot.
func external(imp string) bool {
	if _, ours := own(imp); ours {
		return false
	}
	return strings.Contains(strings.SplitN(imp, "/", 2)[0], ".")
}

// underPrefix says whether an import is the prefix or below it. A prefix that ends in a slash covers only what is below.
func underPrefix(prefix, imp string) bool {
	if strings.HasSuffix(prefix, "/") {
		return strings.HasPrefix(imp, prefix)
	}
	return imp == prefix || strings.HasPrefix(imp, prefix+"/")
}

// CheckImports returns one sentence per violation, and one per rule that applies to nothing.
func CheckImports(packages []Package, rules []Rule) []string {
	byPath := map[string]Package{}
	for _, p := range packages {
		byPath[p.Path] = p
	}
	var faults []string
	for _, r := range rules {
		found := false
		for _, p := range packages {
			if !matches(r.Packages, p.Path) || matchesAny(r.Except, p.Path) {
				continue
			}
			found = true
			for _, imp := range p.Imports {
				if rel, ours := own(imp); ours {
					if r.Own != nil && !matchesAny(r.Own, rel) {
						faults = append(faults, fmt.Sprintf("%s imports %s: %s", p.Path, rel, r.Why))
					}
				} else if external(imp) && r.External != nil &&
					!slices.ContainsFunc(r.External, func(prefix string) bool { return underPrefix(prefix, imp) }) {
					faults = append(faults, fmt.Sprintf("%s imports %s: %s", p.Path, imp, r.Why))
				}
			}
			for _, chain := range forbidden(byPath, p, r.Deny) {
				faults = append(faults, fmt.Sprintf("%s reaches %s: %s", p.Path, chain, r.Why))
			}
		}
		if !found {
			faults = append(faults, fmt.Sprintf("the rule for %s applies to no package: move it with the code or drop it", r.Packages))
		}
	}
	for _, p := range packages {
		for _, imp := range p.Imports {
			if rel, ours := own(imp); ours && path.Base(path.Dir(rel)) == "cmd" {
				faults = append(faults, fmt.Sprintf("%s imports %s: nothing imports a program", p.Path, rel))
			}
		}
	}
	sort.Strings(faults)
	return faults
}

// forbidden walks the imports of a package through our own packages and returns the shortest way to everything denied.
func forbidden(byPath map[string]Package, start Package, deny []string) []string {
	type visit struct {
		p     Package
		trail string
	}
	var chains []string
	seen := map[string]bool{start.Path: true}
	reached := map[string]bool{}
	for queue := []visit{{p: start}}; len(queue) > 0; queue = queue[1:] {
		v := queue[0]
		for _, imp := range v.p.Imports {
			hit := slices.ContainsFunc(deny, func(prefix string) bool { return underPrefix(prefix, imp) })
			// What a package of the standard library does inside is not ours to judge, but only the start is held to
			// those rules: helpers of ours are judged by their own.
			if hit && (v.p.Path == start.Path || external(imp) || strings.HasPrefix(imp, Module)) && !reached[imp] {
				reached[imp] = true
				chains = append(chains, v.trail+strings.TrimPrefix(imp, Module+"/"))
			}
			if rel, ours := own(imp); ours && !seen[rel] {
				if next, ok := byPath[rel]; ok {
					seen[rel] = true
					queue = append(queue, visit{next, v.trail + rel + " -> "})
				}
			}
		}
	}
	return chains
}
