package patchq

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
)

// OpenDir is where Open puts the scratch repository unless told otherwise.
func (r Repo) OpenDir(u Upstream) string { return filepath.Join(r.Root, ".build", "open", u.Name) }

// metaDir is inside the scratch repository's .git: the queue as it was opened, so that Save touches only what was
// edited and several people can work on one queue at the same time.
func metaDir(dir string) string { return filepath.Join(dir, ".git", "patchq") }

// Open makes a scratch git repository with the pristine tree as its first commit, tagged base, and one commit per
// patch on top. It refuses to replace a repository that holds unsaved work.
func (r Repo) Open(u Upstream, dir string) error {
	if _, err := os.Stat(filepath.Join(dir, ".git")); err == nil {
		dirty, err := r.unsaved(dir)
		if err != nil {
			return err
		}
		if dirty {
			return fmt.Errorf("%s holds unsaved work: save it first or remove the folder", dir)
		}
	}
	tree, err := LoadTree(r.Root, u, "")
	if err != nil {
		return err
	}
	patches, err := ReadQueue(r.Queue(u))
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clear scratch repository: %w", err)
	}
	if err := tree.CopyTo(dir); err != nil {
		return err
	}
	if err := series(dir, patches); err != nil {
		return err
	}
	return remember(dir, patches)
}

// remember stores the opened queue and the commit it produced.
func remember(dir string, patches []Patch) error {
	if err := os.RemoveAll(metaDir(dir)); err != nil {
		return fmt.Errorf("clear loop state: %w", err)
	}
	for _, p := range patches {
		if err := writeFile(filepath.Join(metaDir(dir), "queue", p.Name), p.Raw); err != nil {
			return err
		}
	}
	_, err := git(dir, "tag", "--force", "opened")
	return err
}

// unsaved says whether the scratch repository differs from what was opened or saved last.
func (r Repo) unsaved(dir string) (bool, error) {
	status, err := git(dir, "status", "--porcelain")
	if err != nil {
		return false, err
	}
	if len(bytes.TrimSpace(status)) > 0 {
		return true, nil
	}
	if _, err := git(dir, "rev-parse", "--verify", "--quiet", "opened"); err != nil {
		// Opening it failed half-way; there is nothing of value inside.
		return false, nil
	}
	out, err := git(dir, "rev-list", "opened..HEAD")
	return len(bytes.TrimSpace(out)) > 0, err
}

// series turns a folder of pristine files into a repository with one commit per patch.
func series(dir string, patches []Patch) error {
	steps := [][]string{
		{"init", "--quiet", "--initial-branch=podmig"},
		{"add", "--all", "--force"},
		{"commit", "--quiet", "--no-verify", "--allow-empty", "--message", "pristine upstream"},
		{"tag", "base"},
	}
	for i, s := range steps {
		if _, err := git(dir, s...); err != nil {
			return fmt.Errorf("make scratch repository: %w", err)
		}
		if i == 0 {
			// Upstream's attributes must not change line ends: bytes in, the same bytes out.
			if err := writeFile(filepath.Join(dir, ".git", "info", "attributes"), []byte("* -text\n")); err != nil {
				return err
			}
		}
	}
	for _, p := range patches {
		// Message on standard input, so that a name relative to our own folder works.
		cmd := gitCommand(dir, "am", "--quiet", "--whitespace=nowarn", "--no-3way", "--committer-date-is-author-date")
		cmd.Stdin = bytes.NewReader(p.Raw)
		if _, err := output(cmd); err != nil {
			return fmt.Errorf("%s does not apply: %w", p.Name, err)
		}
	}
	return nil
}

// extract writes one file per commit above base, in the one format the queue uses.
func extract(dir string) ([]Patch, error) {
	out, err := os.MkdirTemp("", "patchq-extract-")
	if err != nil {
		return nil, fmt.Errorf("make scratch folder: %w", err)
	}
	defer os.RemoveAll(out)
	if _, err := git(dir, "-c", "core.quotePath=false", "format-patch", "--quiet", "--zero-commit", "--no-signature",
		"--full-index", "--no-numbered", "--no-renames", "--unified=3", "--diff-algorithm=myers",
		"--src-prefix=a/", "--dst-prefix=b/", "--output-directory", out, "base..HEAD"); err != nil {
		return nil, fmt.Errorf("extract patches: %w", err)
	}
	entries, err := os.ReadDir(out)
	if err != nil {
		return nil, fmt.Errorf("extract patches: %w", err)
	}
	var patches []Patch
	for _, e := range entries {
		raw, err := os.ReadFile(filepath.Join(out, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("extract patches: %w", err)
		}
		p, err := ParsePatch(e.Name(), raw)
		if err != nil {
			return nil, err
		}
		patches = append(patches, p)
	}
	return patches, nil
}

// Saved lists what Save did to the queue.
type Saved struct{ Written, Removed []string }

// Save writes the commits of a scratch repository back to the queue. Only patches whose effect or message changed
// since Open are written; a file that somebody else changed in the meantime is an error, not a loss.
func (r Repo) Save(u Upstream, dir string) (Saved, error) {
	status, err := git(dir, "status", "--porcelain")
	if err != nil {
		return Saved{}, fmt.Errorf("%s is no opened queue (run open first): %w", dir, err)
	}
	if len(bytes.TrimSpace(status)) > 0 {
		return Saved{}, fmt.Errorf("%s has uncommitted changes: commit or amend them first\n%s", dir, status)
	}
	now, err := extract(dir)
	if err != nil {
		return Saved{}, err
	}
	if len(now) == 0 {
		return Saved{}, errors.New("the scratch repository has no commits above base: an empty queue is not saved; " +
			"remove the patch files by hand if that is meant")
	}
	opened, err := ReadQueue(filepath.Join(metaDir(dir), "queue"))
	if err != nil {
		return Saved{}, err
	}
	if err := nameSeries(now, opened, r.numbersOf(u)); err != nil {
		return Saved{}, err
	}
	saved, err := r.merge(u, opened, now)
	if err != nil {
		return Saved{}, err
	}
	return saved, remember(dir, now)
}

// merge brings the queue from what was opened to what is wanted now, without touching anything else in it.
func (r Repo) merge(u Upstream, opened, now []Patch) (Saved, error) {
	before := map[string]Patch{}
	for _, p := range opened {
		before[p.Name] = p
	}
	type write struct {
		name string
		raw  []byte
	}
	var writes []write
	var saved Saved
	kept := map[string]bool{}
	for i, p := range now {
		kept[p.Name] = true
		old, known := before[p.Name]
		if known && sameEffect(old.Raw, p.Raw) {
			now[i].Raw = old.Raw
			continue
		}
		current, err := os.ReadFile(filepath.Join(r.Queue(u), p.Name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return Saved{}, fmt.Errorf("read patch: %w", err)
		case bytes.Equal(current, p.Raw):
			continue
		case !known || !bytes.Equal(current, old.Raw):
			return Saved{}, fmt.Errorf("%s changed in the queue since it was opened: open again elsewhere (DIR=) and "+
				"take your commit over with git cherry-pick", p.Name)
		}
		writes = append(writes, write{p.Name, p.Raw})
	}
	for _, p := range opened {
		if kept[p.Name] {
			continue
		}
		current, err := os.ReadFile(filepath.Join(r.Queue(u), p.Name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Saved{}, fmt.Errorf("read patch: %w", err)
		}
		if !bytes.Equal(current, p.Raw) {
			return Saved{}, fmt.Errorf("%s is gone from the series but changed in the queue since it was opened", p.Name)
		}
		saved.Removed = append(saved.Removed, p.Name)
	}
	// Everything that can be refused has been looked at; now the files change.
	for _, w := range writes {
		if err := writeFile(filepath.Join(r.Queue(u), w.name), w.raw); err != nil {
			return saved, err
		}
		saved.Written = append(saved.Written, w.name)
	}
	for _, name := range saved.Removed {
		if err := os.Remove(filepath.Join(r.Queue(u), name)); err != nil {
			return saved, fmt.Errorf("remove patch: %w", err)
		}
	}
	return saved, nil
}

// Refresh rewrites the queue in its own format: right line numbers, hashes and order, same effect.
func (r Repo) Refresh(u Upstream) (Saved, error) {
	tree, err := LoadTree(r.Root, u, "")
	if err != nil {
		return Saved{}, err
	}
	patches, err := ReadQueue(r.Queue(u))
	if err != nil || len(patches) == 0 {
		return Saved{}, err
	}
	now, err := roundTrip(tree, patches)
	if err != nil {
		return Saved{}, err
	}
	if len(now) != len(patches) {
		return Saved{}, fmt.Errorf("%d patches became %d: one of them has no effect", len(patches), len(now))
	}
	var saved Saved
	for i, p := range now {
		if bytes.Equal(p.Raw, patches[i].Raw) {
			continue
		}
		if err := writeFile(patches[i].Path, p.Raw); err != nil {
			return saved, err
		}
		saved.Written = append(saved.Written, patches[i].Name)
	}
	return saved, nil
}

// roundTrip applies the queue to the files it touches and extracts it again.
func roundTrip(tree Tree, patches []Patch) ([]Patch, error) {
	dir, err := os.MkdirTemp("", "patchq-series-")
	if err != nil {
		return nil, fmt.Errorf("make scratch folder: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := copyPristine(tree, dir, touched(patches)); err != nil {
		return nil, err
	}
	if err := series(dir, patches); err != nil {
		return nil, err
	}
	return extract(dir)
}

var dateLine = regexp.MustCompile(`(?m)^(From|Date): .*$`)

// sameEffect compares two patches without who wrote them and when.
func sameEffect(a, b []byte) bool {
	return bytes.Equal(dateLine.ReplaceAll(a, nil), dateLine.ReplaceAll(b, nil))
}

// numbersOf lists the numbers that files of the queue use now, whoever put them there.
func (r Repo) numbersOf(u Upstream) map[int]bool {
	used := map[int]bool{}
	names, err := filepath.Glob(filepath.Join(r.Queue(u), "*.patch"))
	if err != nil {
		return used
	}
	for _, n := range names {
		used[number(filepath.Base(n))] = true
	}
	return used
}

func number(name string) int {
	n, err := strconv.Atoi(name[:min(4, len(name))])
	if err != nil {
		return 0
	}
	return n
}

var notSlug = regexp.MustCompile(`[^a-z0-9]+`)

func slug(subject string) string {
	s := regexp.MustCompile(`([a-z])([A-Z])`).ReplaceAllString(subject, "$1-$2")
	return strings.Trim(notSlug.ReplaceAllString(strings.ToLower(s), "-"), "-")
}

// nameSeries gives every patch of a series its file name. A patch keeps the file whose subject it has. Among the
// rest, one that sits where an opened patch is missing takes over that number; a new one gets the next ten after its
// neighbour.
func nameSeries(now, opened []Patch, used map[int]bool) error {
	bySubject := map[string]string{}
	for _, p := range opened {
		bySubject[p.Subject] = p.Name
	}
	claimed := map[string]bool{}
	for i := range now {
		now[i].Name = ""
		if name, ok := bySubject[now[i].Subject]; ok && !claimed[name] {
			now[i].Name, claimed[name] = name, true
		}
	}
	var free []int
	taken := map[int]bool{}
	for n := range used {
		taken[n] = true
	}
	for _, p := range opened {
		taken[number(p.Name)] = true
		if !claimed[p.Name] {
			free = append(free, number(p.Name))
		}
	}
	sort.Ints(free)
	last := 0
	for i := range now {
		if now[i].Name != "" {
			if number(now[i].Name) <= last {
				return fmt.Errorf("%s would come after number %04d: file names are the order, so rename the files "+
					"instead of reordering commits", now[i].Name, last)
			}
			last = number(now[i].Name)
			continue
		}
		next := 10000
		for _, p := range now[i+1:] {
			if p.Name != "" {
				next = number(p.Name)
				break
			}
		}
		n := 0
		for _, f := range free {
			if f > last && f < next && n == 0 {
				n = f
			}
		}
		if n == 0 {
			for n = (last/10 + 1) * 10; taken[n] && n < next; n += 10 {
			}
			if n <= last || n >= next {
				return fmt.Errorf("no number left between %04d and %04d: rename the files behind them by hand", last, next)
			}
		}
		taken[n] = true
		free = deleteInt(free, n)
		now[i].Name = fmt.Sprintf("%04d-%s.patch", n, slug(now[i].Subject))
		last = n
	}
	return nil
}

func deleteInt(list []int, n int) []int {
	var out []int
	for _, v := range list {
		if v != n {
			out = append(out, v)
		}
	}
	return out
}
