package rules

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Patterns that betray the machine or the hands a file was written with. They are assembled from pieces, so that this
// file does not contain what it looks for.
var traces = []struct {
	what string
	form *regexp.Regexp
}{
	{"a path of a developer's machine", regexp.MustCompile(`(^|[\s"'=:(` + "`" + `])/(` + strings.Join([]string{"wor" + "k", "ho" + "me"}, "|") + `)/[a-z]`)},
	{"a path below the home of root", regexp.MustCompile("/ro" + `ot/(go|\.|main|tmp)`)},
	{"a word for unfinished work", regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)},
	{"a test that skips itself", regexp.MustCompile(`\bt\.(Sk` + `ip|Sk` + `ipf|Sk` + `ipNow)\(`)},
}

// CheckText returns the traces in a file of ours.
func CheckText(name string, raw []byte) []string {
	var faults []string
	for i, line := range strings.Split(string(raw), "\n") {
		for _, t := range traces {
			if t.form.MatchString(line) {
				faults = append(faults, fmt.Sprintf("%s:%d: %s: %s", name, i+1, t.what, strings.TrimSpace(line)))
			}
		}
	}
	return faults
}

// CheckTopLevel compares the root of the repository with what may be there.
func CheckTopLevel(names []string) []string {
	var faults []string
	for _, n := range names {
		if !slices.Contains(TopLevel, n) {
			faults = append(faults, fmt.Sprintf("%s does not belong into the root: the layout is fixed", n))
		}
	}
	for _, n := range []string{"Makefile", "README.md", "cluster-setup", "containerd-cri", "cri-api", "go.mod", "go.sum", "kubelet", "patches", "tools"} {
		if !slices.Contains(names, n) {
			faults = append(faults, n+" is missing in the root")
		}
	}
	return faults
}

// maxLines is where a file has too many reasons to change.
const maxLines = 800

// CheckLength returns a fault if a hand-written Go file is too long.
func CheckLength(name string, raw []byte) []string {
	if n := strings.Count(string(raw), "\n"); n > maxLines && !generated(raw) {
		return []string{fmt.Sprintf("%s has %d lines: split it at a reason to change (limit %d)", name, n, maxLines)}
	}
	return nil
}

var generatedLine = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func generated(raw []byte) bool { return generatedLine.Match(raw) }
