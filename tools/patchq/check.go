package patchq

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// Report is what Check found in one queue.
type Report struct {
	Upstream Upstream
	Version  string
	Patches  []Patch
	// Faults are sentences; an empty list means that the queue is in order.
	Faults []string
}

// Check examines every queue: form, application without offset or fuzz, round trip, patches that upstream already
// has, and hooks that are declared but never set or the other way round. It reads the checkout and writes nothing
// into it.
func (r Repo) Check() ([]Report, error) {
	var reports []Report
	hooks := newHooks()
	for _, u := range Upstreams {
		tree, err := LoadTree(r.Root, u, "")
		if err != nil {
			return nil, err
		}
		report := Report{Upstream: u, Version: tree.Version, Faults: lintFolder(r.Queue(u))}
		patches, err := ReadQueue(r.Queue(u))
		if err != nil {
			report.Faults = append(report.Faults, err.Error())
			reports = append(reports, report)
			continue
		}
		report.Patches = patches
		report.Faults = append(report.Faults, Lint(patches)...)
		faults, overlay, err := checkApply(tree, patches)
		if err != nil {
			return nil, err
		}
		report.Faults = append(report.Faults, faults...)
		if err := hooks.declare(tree, patches, overlay); err != nil {
			report.Faults = append(report.Faults, err.Error())
		}
		reports = append(reports, report)
	}
	if err := hooks.use(r.Root); err != nil {
		return nil, err
	}
	for i := range reports {
		reports[i].Faults = append(reports[i].Faults, hooks.faults(reports[i].Upstream)...)
	}
	return reports, nil
}

// checkApply applies the queue and returns the faults with the patched files.
func checkApply(tree Tree, patches []Patch) ([]string, Overlay, error) {
	if len(patches) == 0 {
		return nil, nil, nil
	}
	var faults []string
	overlay, results, err := PatchOverlay(tree, patches)
	for _, a := range results {
		for _, o := range a.Offsets {
			faults = append(faults, fmt.Sprintf("%s: %s: run make patch-refresh UPSTREAM=%s", a.Patch.Name, o, tree.Upstream.Name))
		}
	}
	if err != nil {
		return append(faults, err.Error()), nil, nil
	}
	now, err := roundTrip(tree, patches)
	if err != nil {
		return append(faults, err.Error()), overlay, nil
	}
	if len(now) != len(patches) {
		faults = append(faults, fmt.Sprintf("%d patches become %d when applied and extracted: one of them has no effect", len(patches), len(now)))
	} else {
		for i, p := range now {
			if !bytes.Equal(p.Raw, patches[i].Raw) {
				faults = append(faults, fmt.Sprintf("%s: applying and extracting it gives another file (%s): run make patch-refresh UPSTREAM=%s",
					patches[i].Name, firstDifference(patches[i].Raw, p.Raw), tree.Upstream.Name))
			}
		}
	}
	for _, p := range patches {
		dead, err := isDead(tree, p)
		if err != nil {
			return nil, nil, err
		}
		if dead {
			faults = append(faults, fmt.Sprintf("%s: upstream %s already contains it: drop it", p.Name, tree.Version))
		}
	}
	return faults, overlay, nil
}

// isDead says whether a patch can be taken back from pristine upstream, which means that upstream has it.
func isDead(tree Tree, p Patch) (bool, error) {
	dir, err := os.MkdirTemp("", "patchq-dead-")
	if err != nil {
		return false, fmt.Errorf("make scratch folder: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := copyPristine(tree, dir, touched([]Patch{p})); err != nil {
		return false, err
	}
	_, err = applyOne(dir, p, "--reverse", "--check")
	return err == nil, nil
}

func firstDifference(a, b []byte) string {
	x, y := strings.Split(string(a), "\n"), strings.Split(string(b), "\n")
	for i := range min(len(x), len(y)) {
		if x[i] != y[i] {
			return fmt.Sprintf("line %d is %q, should be %q", i+1, x[i], y[i])
		}
	}
	return fmt.Sprintf("%d lines, should be %d", len(x), len(y))
}

// Drifted is the fate of one patch on another version.
type Drifted struct {
	Patch Patch
	// Outcome is one of "applies", "moved", "conflict" and "contained"; Detail holds git's words.
	Outcome, Detail string
}

// Drift reports how a queue would apply to another version. A patch that conflicts is left out and the next one is
// tried without it.
func (r Repo) Drift(u Upstream, version string) ([]Drifted, error) {
	tree, err := LoadTree(r.Root, u, version)
	if err != nil {
		return nil, err
	}
	patches, err := ReadQueue(r.Queue(u))
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "patchq-drift-")
	if err != nil {
		return nil, fmt.Errorf("make scratch folder: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := copyPristine(tree, dir, touched(patches)); err != nil {
		return nil, err
	}
	var out []Drifted
	for _, p := range patches {
		d := Drifted{Patch: p, Outcome: "applies"}
		offsets, err := applyOne(dir, p)
		switch {
		case err == nil && len(offsets) > 0:
			d.Outcome, d.Detail = "moved", strings.Join(offsets, "; ")
		case err != nil:
			dead, deadErr := isDead(tree, p)
			if deadErr != nil {
				return nil, deadErr
			}
			if d.Outcome, d.Detail = "conflict", conflict(err); dead {
				d.Outcome, d.Detail = "contained", "upstream has it"
			}
		}
		out = append(out, d)
	}
	return out, nil
}

// conflict keeps git's lines about what did not match.
func conflict(err error) string {
	var lines []string
	for line := range strings.Lines(err.Error()) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "error:") && !strings.Contains(line, "while searching for") {
			lines = append(lines, strings.TrimPrefix(line, "error: "))
		}
	}
	return strings.Join(lines, "; ")
}
