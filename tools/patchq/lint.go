package patchq

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
)

// What one patch may change in files that upstream already has. New files and tests are not counted: they cannot
// conflict.
const (
	budgetLines = 10
	budgetFiles = 3
)

// ownModule must not appear in a patch: patched upstream stays readable and testable without us.
const ownModule = "podmig.dev/podmig"

var (
	subjectForm = regexp.MustCompile(`^[a-z0-9][a-zA-Z0-9/_. -]*: [a-z][^\s].*[^.\s]$`)
	sentence    = regexp.MustCompile(`\w+ \w+ \w+`)
	classes     = map[string]bool{"hook": true, "expose": true, "fix": true, "backport": true, "generated": true}
)

// Lint looks at the patches of one queue without applying them and returns one sentence per fault.
func Lint(patches []Patch) []string {
	var faults []string
	seen := map[int]string{}
	for _, p := range patches {
		n := number(p.Name)
		if other, dup := seen[n]; dup {
			faults = append(faults, fmt.Sprintf("%s: number %04d is already used by %s", p.Name, n, other))
		}
		seen[n] = p.Name
		if n%10 != 0 || n == 0 {
			faults = append(faults, fmt.Sprintf("%s: numbers are tens, so that a patch can go in between", p.Name))
		}
		for _, f := range lintOne(p) {
			faults = append(faults, p.Name+": "+f)
		}
	}
	return faults
}

func lintOne(p Patch) []string {
	var faults []string
	if !subjectForm.MatchString(p.Subject) {
		faults = append(faults, fmt.Sprintf("subject %q is not of the form \"area: verb object\"", p.Subject))
	}
	if p.Body == "" {
		faults = append(faults, "the header does not say why the patch is needed")
	}
	for _, field := range []string{"Patch-Class", "Upstream", "Drop-When", "Used-By", "Tests"} {
		if p.Trailers[field] == "" {
			faults = append(faults, "header field "+field+" is missing")
		}
	}
	if class := p.Trailers["Patch-Class"]; class != "" && !classes[class] {
		faults = append(faults, fmt.Sprintf("Patch-Class %q is none of hook, expose, fix, backport, generated", class))
	}
	if reason, ok := p.Trailers["Over-Budget"]; ok && !sentence.MatchString(reason) {
		faults = append(faults, "Over-Budget does not say why")
	}
	for _, f := range p.Files {
		if generatedFile.MatchString(f.Name) != p.Generated() {
			if p.Generated() {
				faults = append(faults, f.Name+" is not a generated file: put it into a patch of its own")
			} else {
				faults = append(faults, f.Name+" is a generated file: make assemble writes it, so drop it from the patch")
			}
		}
		for _, l := range f.AddedLines {
			if strings.TrimRight(l, " \t\r") != l {
				faults = append(faults, fmt.Sprintf("%s: a line ends in white space: %q", f.Name, l))
			}
			if strings.Contains(l, ownModule) {
				faults = append(faults, fmt.Sprintf("%s: names our module, which upstream must not know: %q", f.Name, l))
			}
		}
	}
	if p.Generated() {
		return faults
	}
	lines, files := p.Footprint()
	if _, ok := p.Trailers["Over-Budget"]; !ok && (lines > budgetLines || files > budgetFiles) {
		faults = append(faults, fmt.Sprintf("changes %d lines in %d existing files; the budget is %d in %d: make it smaller or add Over-Budget: <why>",
			lines, files, budgetLines, budgetFiles))
	}
	return faults
}

// Footprint counts the lines and files that a patch changes where upstream can change them, too.
func (p Patch) Footprint() (lines, files int) {
	for _, f := range p.Files {
		if f.New || strings.HasSuffix(f.Name, "_test.go") || strings.Contains(f.Name, "/testdata/") {
			continue
		}
		lines += max(f.Added, f.Removed)
		files++
	}
	return lines, files
}

// lintFolder finds what does not belong into the folder of a queue.
func lintFolder(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return []string{fmt.Sprintf("%s: %v (an upstream without patches keeps a README.md that says why)", filepath.Base(dir), err)}
	}
	var faults []string
	readme := false
	for _, e := range entries {
		switch {
		case e.Name() == "README.md":
			readme = true
		case !patchName.MatchString(e.Name()):
			faults = append(faults, fmt.Sprintf("%s: stray file in a patch queue", path.Join(filepath.Base(dir), e.Name())))
		}
	}
	if !readme {
		faults = append(faults, filepath.Base(dir)+": README.md is missing: say what the queue is for, or why it is empty")
	}
	return faults
}
