package build

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"podmig.dev/podmig/tools/patchq"
)

// step is one call of the Go tool.
type step struct {
	// name is shown to the user and names the log file.
	name string
	// dir is where the Go tool runs, relative to the root of the project.
	dir string
	// env is added to the environment.
	env []string
	// args follow "go build"; output is added by the runner.
	args []string
	// packages are the programs to build.
	packages []string
	// folder is below .build/bin, empty for .build/bin itself.
	folder string
	// rename gives a single program a file name other than its package's.
	rename string
	// binaries are the files that exist afterwards, relative to .build/bin.
	binaries []string
	// onDemand is built only when it is named.
	onDemand bool
}

// versions are what the binaries of one upstream report.
type versions struct {
	// text is the full version with our suffix, time when upstream released it, revision identifies sources and patches.
	text, time, revision string
}

// kubernetesPrograms and the two lists below are the unchanged programs of each upstream. The others are ours: their
// mains add our packages to upstream's commands.
var (
	kubernetesPrograms = []string{"kube-apiserver", "kube-proxy", "kube-scheduler", "kubectl"}
	containerdPrograms = []string{"containerd-shim-runc-v2", "ctr"}
	cniPrograms        = []string{"ipam/host-local", "main/bridge", "main/loopback", "main/ptp", "meta/portmap"}
)

// wrapped are the programs whose main is ours as soon as it exists.
var wrapped = []struct{ name, ours, upstream string }{
	{"kubelet", "kubelet/cmd/kubelet", "k8s.io/kubernetes/cmd/kubelet"},
	{"kube-controller-manager", "kubelet/cmd/kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{"containerd", "containerd-cri/cmd/containerd", "github.com/containerd/containerd/v2/cmd/containerd"},
}

// notInstalled are programs of ours that only make uses.
var notInstalled = map[string]bool{"podmig-build": true, "patchq": true, "crdtrim": true}

// plan lists the steps in the order in which they run.
func plan(root string, v map[string]versions) ([]step, error) {
	kube, cd, runc := v["kubernetes"], v["containerd"], v["runc"]
	major, minor := majorMinor(kube.text)
	var x []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		x = append(x,
			pkg+".gitVersion="+kube.text, pkg+".gitCommit="+kube.revision, pkg+".gitTreeState=clean",
			pkg+".gitMajor="+major, pkg+".gitMinor="+minor, pkg+".buildDate="+kube.time)
	}
	// Programs that share link flags share a call, so that their packages are loaded once; a change of one queue does
	// not link the other upstream's programs again.
	kubernetes := patchedStep("kubernetes", x)
	for _, p := range kubernetesPrograms {
		kubernetes.add("k8s.io/kubernetes/cmd/"+p, p)
	}
	containerd := patchedStep("containerd", []string{
		"github.com/containerd/containerd/v2/version.Version=" + cd.text,
		"github.com/containerd/containerd/v2/version.Revision=" + cd.revision,
	})
	for _, p := range containerdPrograms {
		containerd.add("github.com/containerd/containerd/v2/cmd/"+p, p)
	}
	done := map[string]bool{}
	for _, w := range wrapped {
		pkg := w.upstream
		if hasMain(filepath.Join(root, w.ours)) {
			pkg = "./" + w.ours
		}
		done[w.ours] = true
		if strings.HasPrefix(w.upstream, "k8s.io/kubernetes/") {
			kubernetes.add(pkg, w.name)
		} else {
			containerd.add(pkg, w.name)
		}
	}
	// A kubelet that tests can stop at any step of a migration. Nobody else wants it.
	faults := patchedStep("faults", x)
	faults.folder, faults.onDemand = "faults", true
	faults.args[1] += ",podmig_faults"
	if hasMain(filepath.Join(root, wrapped[0].ours)) {
		faults.add("./"+wrapped[0].ours, "faults/"+wrapped[0].name)
	}
	own := patchedStep("podmig", nil)
	mains, err := ownMains(root)
	if err != nil {
		return nil, err
	}
	for _, dir := range mains {
		if name := filepath.Base(dir); !done[dir] && !notInstalled[name] {
			own.add("./"+filepath.ToSlash(dir), name)
		}
	}

	cni := step{
		// A folder of its own, because containerd is given the whole folder.
		name: "cni", folder: "cni", env: []string{"CGO_ENABLED=0"},
		args: []string{"-ldflags=-s -w" + linkFlags([]string{
			"github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=" + v["cni"].text})},
	}
	for _, p := range cniPrograms {
		cni.add("github.com/containernetworking/plugins/plugins/"+p, "cni/"+filepath.Base(p))
	}

	steps := []step{
		own,
		containerd,
		kubernetes,
		cni,
		{
			// The package is called server.
			name: "etcd", env: []string{"CGO_ENABLED=0"}, args: []string{"-ldflags=-s -w"},
			packages: []string{"go.etcd.io/etcd/server/v3"}, rename: "etcd", binaries: []string{"etcd"},
		},
		{
			// Static, because it runs inside mount namespaces of containers and in node images of other distributions.
			name: "runc", env: []string{"CGO_ENABLED=1"},
			args: []string{"-modfile=.build/go.mod", "-tags=seccomp,urfave_cli_no_docs,netgo,osusergo",
				"-ldflags=-s -w -extldflags -static" + linkFlags([]string{
					"main.extraVersion=" + runc.text[strings.Index(runc.text, "+"):], "main.gitCommit=" + runc.revision})},
			packages: []string{"github.com/opencontainers/runc"}, binaries: []string{"runc"},
		},
	}
	if hasMain(filepath.Join(root, dnsDir)) {
		steps = append(steps, step{
			name: "coredns", dir: dnsDir, env: []string{"CGO_ENABLED=0"}, args: []string{"-ldflags=-s -w"},
			packages: []string{"."}, rename: "coredns", binaries: []string{"coredns"},
		})
	}
	steps = append(steps, faults)
	return slices.DeleteFunc(steps, func(s step) bool { return len(s.packages) == 0 }), nil
}

// patchedStep starts a step that compiles against the patched sources.
func patchedStep(name string, variables []string) step {
	return step{
		name: name, env: []string{"CGO_ENABLED=0"},
		args: []string{"-modfile=.build/go.mod", "-tags=podmig_patched", "-ldflags=-s -w" + linkFlags(variables)},
	}
}

// dnsDir is a module of its own.
const dnsDir = "cluster-setup/dns"

func (s *step) add(pkg, binary string) {
	s.packages = append(s.packages, pkg)
	s.binaries = append(s.binaries, binary)
}

func linkFlags(x []string) string {
	var b strings.Builder
	for _, v := range x {
		fmt.Fprintf(&b, " -X %s", v)
	}
	return b.String()
}

// majorMinor splits v1.37.1+podmig.9 into 1 and 37.
func majorMinor(version string) (string, string) {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return "", ""
	}
	return parts[0], parts[1]
}

// hasMain says whether a folder holds Go files besides tests.
func hasMain(dir string) bool {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return false
	}
	for _, n := range names {
		if !strings.HasSuffix(n, "_test.go") {
			return true
		}
	}
	return false
}

// ownMains lists the folders of our programs: <folder>/cmd/<program>, by the layout of the project.
func ownMains(root string) ([]string, error) {
	var dirs []string
	for _, pattern := range []string{"*/cmd/*", "*/*/cmd/*"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return nil, fmt.Errorf("list programs: %w", err)
		}
		for _, d := range found {
			rel, err := filepath.Rel(root, d)
			if err != nil {
				return nil, fmt.Errorf("list programs: %w", err)
			}
			if strings.HasPrefix(rel, ".") || !hasMain(d) {
				continue
			}
			if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
				// A module of its own is not part of this build.
				continue
			}
			dirs = append(dirs, rel)
		}
	}
	sort.Strings(dirs)
	return dirs, nil
}

// readVersions derives what the binaries report from the pinned versions and the queue. Everything in it is a
// function of committed files, so the same checkout gives the same binaries.
func readVersions(repo patchq.Repo) (map[string]versions, error) {
	out := map[string]versions{}
	for _, u := range patchq.Upstreams {
		id, err := repo.Identify(u)
		if err != nil {
			return nil, err
		}
		out[u.Name] = versions{
			text:     fmt.Sprintf("%s+podmig.%d", id.Version, id.Patches),
			time:     id.Time.UTC().Format("2006-01-02T15:04:05Z"),
			revision: id.Revision,
		}
	}
	cni, err := repo.RequiredVersion("github.com/containernetworking/plugins")
	if err != nil {
		return nil, err
	}
	out["cni"] = versions{text: cni}
	return out, nil
}
