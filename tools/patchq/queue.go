package patchq

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
)

// Patch is one file of the queue.
type Patch struct {
	// Name is the file name, Path the file.
	Name, Path string
	Raw        []byte
	// Subject is the first line of the commit message.
	Subject string
	// Body is the message without subject and trailers.
	Body string
	// Trailers holds the fixed fields of the header by name.
	Trailers map[string]string
	// Files are the changes, in the order of the patch.
	Files []FileChange
}

// FileChange is what a patch does to one file.
type FileChange struct {
	Name string
	// New and Deleted say that the file appears or vanishes.
	New, Deleted bool
	// Added and Removed count changed lines.
	Added, Removed int
	// AddedLines are the lines that appear, without the plus sign.
	AddedLines []string
}

// Generated says whether the patch carries the output of a generator instead of hand-written changes.
func (p Patch) Generated() bool { return p.Trailers["Patch-Class"] == "generated" }

var patchName = regexp.MustCompile(`^(\d{4})-[a-z0-9][a-z0-9.-]*\.patch$`)

// ReadQueue reads the patches of one upstream in the order in which they apply.
func ReadQueue(dir string) ([]Patch, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read patch queue: %w", err)
	}
	var patches []Patch
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".patch" {
			continue
		}
		if !patchName.MatchString(e.Name()) {
			return nil, fmt.Errorf("%s: patch files are named NNNN-area-verb-object.patch", filepath.Join(dir, e.Name()))
		}
		raw, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("read patch: %w", err)
		}
		p, err := ParsePatch(e.Name(), raw)
		if err != nil {
			return nil, err
		}
		p.Path = filepath.Join(dir, e.Name())
		patches = append(patches, p)
	}
	sort.Slice(patches, func(i, j int) bool { return patches[i].Name < patches[j].Name })
	return patches, nil
}

var trailerLine = regexp.MustCompile(`^(Patch-Class|Upstream|Drop-When|Used-By|Tests|Over-Budget):\s*(.*)$`)

// ParsePatch reads a patch in the mail format that git format-patch writes.
func ParsePatch(name string, raw []byte) (Patch, error) {
	p := Patch{Name: name, Raw: raw, Trailers: map[string]string{}}
	lines := strings.Split(string(raw), "\n")
	i := 0
	var body []string
	inMail, last := true, ""
	for ; i < len(lines); i++ {
		line := lines[i]
		if line == "---" || strings.HasPrefix(line, "diff --git ") {
			break
		}
		if inMail {
			switch {
			case strings.HasPrefix(line, "Subject: "):
				p.Subject, last = strings.TrimPrefix(line, "Subject: "), "Subject"
			case last == "Subject" && strings.HasPrefix(line, " "):
				p.Subject += line
			case line == "":
				inMail = false
				last = ""
			default:
				last = ""
			}
			continue
		}
		if m := trailerLine.FindStringSubmatch(line); m != nil {
			if _, dup := p.Trailers[m[1]]; dup {
				return Patch{}, fmt.Errorf("%s: %s appears twice in the header", name, m[1])
			}
			p.Trailers[m[1]], last = m[2], m[1]
			continue
		}
		if last != "" && strings.HasPrefix(line, " ") {
			p.Trailers[last] += " " + strings.TrimSpace(line)
			continue
		}
		last = ""
		body = append(body, line)
	}
	p.Body = strings.TrimSpace(strings.Join(body, "\n"))
	p.Subject = strings.TrimSpace(regexp.MustCompile(`^\[PATCH[^\]]*\]\s*`).ReplaceAllString(p.Subject, ""))
	files, err := parseDiff(lines[i:])
	if err != nil {
		return Patch{}, fmt.Errorf("%s: %w", name, err)
	}
	if len(files) == 0 {
		return Patch{}, fmt.Errorf("%s: changes no file", name)
	}
	p.Files = files
	return p, nil
}

var (
	hunkLine = regexp.MustCompile(`^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@`)
	diffLine = regexp.MustCompile(`^diff --git a/(\S+) b/(\S+)$`)
)

func parseDiff(lines []string) ([]FileChange, error) {
	var files []FileChange
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		if m := diffLine.FindStringSubmatch(line); m != nil {
			if m[1] != m[2] {
				return nil, fmt.Errorf("renames %s to %s: write it as a deletion and a new file", m[1], m[2])
			}
			files = append(files, FileChange{Name: m[1]})
			continue
		}
		if len(files) == 0 {
			continue
		}
		f := &files[len(files)-1]
		switch {
		case strings.HasPrefix(line, "new file mode"):
			f.New = true
		case strings.HasPrefix(line, "deleted file mode"):
			f.Deleted = true
		case strings.HasPrefix(line, "GIT binary patch"), strings.HasPrefix(line, "Binary files"):
			return nil, fmt.Errorf("%s: binary change", f.Name)
		}
		m := hunkLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		old, now := hunkCount(m[1]), hunkCount(m[2])
		for old > 0 || now > 0 {
			if i++; i >= len(lines) {
				return nil, fmt.Errorf("%s: hunk ends early", f.Name)
			}
			switch l := lines[i]; {
			case strings.HasPrefix(l, "+"):
				f.Added++
				f.AddedLines = append(f.AddedLines, l[1:])
				now--
			case strings.HasPrefix(l, "-"):
				f.Removed++
				old--
			case strings.HasPrefix(l, `\`):
			case (l == "" || l[0] == ' ') && old > 0 && now > 0:
				old--
				now--
			default:
				return nil, fmt.Errorf("%s: hunk ends early", f.Name)
			}
		}
	}
	return files, nil
}

func hunkCount(s string) int {
	if s == "" {
		return 1
	}
	n := 0
	for _, c := range s {
		n = n*10 + int(c-'0')
	}
	return n
}
