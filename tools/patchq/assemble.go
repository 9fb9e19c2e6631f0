package patchq

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Repo is a checkout of podmig.
type Repo struct {
	// Root is the absolute folder of go.mod.
	Root string
	// Log receives one line per step.
	Log io.Writer
}

// Queue is the folder of an upstream's patches.
func (r Repo) Queue(u Upstream) string { return filepath.Join(r.Root, "patches", u.Name) }

// Src is where an upstream's patched sources are.
func (r Repo) Src(u Upstream) string { return filepath.Join(r.Root, ".build", "src", u.Name) }

// ModFile is the generated module file that makes the Go tool build from the patched sources.
func (r Repo) ModFile() string { return filepath.Join(r.Root, ".build", "go.mod") }

func (r Repo) logf(format string, args ...any) { fmt.Fprintf(r.Log, format+"\n", args...) }

// treeState remembers what an assembled tree holds, so that the next run touches only what differs.
type treeState struct {
	// Tree is the identity of the pristine sources below.
	Tree string
	// Touched are the paths that may differ from them.
	Touched []string
}

// Assemble brings .build/src and .build/go.mod in line with go.mod, go.sum and the patch queue. Files whose content
// does not change are not rewritten, so the Go build cache and make see only real changes. Runs of several processes
// wait for each other.
func (r Repo) Assemble() error {
	unlock, err := r.lock()
	if err != nil {
		return err
	}
	defer unlock()

	stamp, err := r.stamp()
	if err != nil {
		return err
	}
	stampFile := filepath.Join(r.Root, ".build", "src", ".stamp")
	if old, err := os.ReadFile(stampFile); err == nil && string(old) == stamp {
		return nil
	}
	// A run that dies half-way must not be taken for a finished one.
	if err := os.Remove(stampFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old stamp: %w", err)
	}

	r.logf("assemble: fetching, copying and patching upstream's sources")
	modules := map[string]string{}
	for _, u := range Upstreams {
		if err := r.assembleOne(u, modules); err != nil {
			return fmt.Errorf("assemble %s: %w", u.Name, err)
		}
	}
	if err := r.writeModFile(modules); err != nil {
		return err
	}
	return writeFile(stampFile, []byte(stamp))
}

func (r Repo) assembleOne(u Upstream, modules map[string]string) error {
	start := time.Now()
	tree, err := LoadTree(r.Root, u, "")
	if err != nil {
		return err
	}
	patches, err := ReadQueue(r.Queue(u))
	if err != nil {
		return err
	}
	overlay, results, err := PatchOverlay(tree, patches)
	if err != nil {
		return err
	}
	for _, a := range results {
		for _, o := range a.Offsets {
			r.logf("  note: %s: %s (refresh the patch; patch-check refuses offsets)", a.Patch.Name, o)
		}
	}
	if err := r.fill(tree); err != nil {
		return err
	}
	generated, err := r.generate(tree, overlay)
	if err != nil {
		return fmt.Errorf("generate code: %w", err)
	}
	for p, raw := range generated {
		if _, ok := overlay[p]; ok {
			return fmt.Errorf("%s is generated at build time, so no patch may touch it: drop that part of the patch", p)
		}
		overlay[p] = raw
	}
	changed, err := r.sync(tree, overlay)
	if err != nil {
		return err
	}
	tree.addReplaces(modules, overlay, r.Src(u), r.Root)
	r.logf("assemble %s %s: %d patches, %d generated files, %d files written (%.1fs)",
		u.Name, tree.Version, len(patches), len(generated), changed, time.Since(start).Seconds())
	return nil
}

// stamp is a hash of everything that Assemble reads.
func (r Repo) stamp() (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "generators %s\n", generatorsID())
	names := []string{"go.mod", "go.sum"}
	for _, u := range Upstreams {
		patches, err := filepath.Glob(filepath.Join(r.Queue(u), "*.patch"))
		if err != nil {
			return "", fmt.Errorf("list patches: %w", err)
		}
		sort.Strings(patches)
		for _, p := range patches {
			rel, err := filepath.Rel(r.Root, p)
			if err != nil {
				return "", fmt.Errorf("list patches: %w", err)
			}
			names = append(names, rel)
		}
	}
	for _, n := range names {
		raw, err := os.ReadFile(filepath.Join(r.Root, n))
		if err != nil {
			return "", fmt.Errorf("hash inputs: %w", err)
		}
		fmt.Fprintf(h, "%s %d\n", n, len(raw))
		h.Write(raw)
	}
	return hex.EncodeToString(h.Sum(nil)) + "\n", nil
}

// lock serialises runs in one checkout.
func (r Repo) lock() (func(), error) {
	dir := filepath.Join(r.Root, ".build")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make build folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open build lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("take build lock: %w", err)
	}
	return func() { f.Close() }, nil
}

func (r Repo) stateFile(u Upstream) string {
	return filepath.Join(r.Root, ".build", "src", "."+u.Name+".json")
}

func (r Repo) readState(u Upstream) treeState {
	var s treeState
	raw, err := os.ReadFile(r.stateFile(u))
	if err != nil || json.Unmarshal(raw, &s) != nil {
		// Without a readable state the tree counts as absent and is filled again.
		return treeState{}
	}
	return s
}

func (r Repo) writeState(u Upstream, s treeState) error {
	raw, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("encode tree state: %w", err)
	}
	tmp := r.stateFile(u) + ".tmp"
	if err := writeFile(tmp, raw); err != nil {
		return err
	}
	if err := os.Rename(tmp, r.stateFile(u)); err != nil {
		return fmt.Errorf("store tree state: %w", err)
	}
	return nil
}

// fill copies the pristine tree if the one in place is of other versions.
func (r Repo) fill(t Tree) error {
	u := t.Upstream
	if r.readState(u).Tree == t.ID() {
		if _, err := os.Stat(r.Src(u)); err == nil {
			return nil
		}
	}
	tmp := r.Src(u) + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("clear scratch tree: %w", err)
	}
	if err := t.CopyTo(tmp); err != nil {
		return err
	}
	if err := os.RemoveAll(r.Src(u)); err != nil {
		return fmt.Errorf("clear old tree: %w", err)
	}
	if err := os.Rename(tmp, r.Src(u)); err != nil {
		return fmt.Errorf("put tree in place: %w", err)
	}
	return r.writeState(u, treeState{Tree: t.ID()})
}

// CopyTo copies the whole pristine tree to dir, writable.
func (t Tree) CopyTo(dir string) error {
	type job struct{ from, to string }
	jobs := make(chan job, 256)
	var wg sync.WaitGroup
	var once sync.Once
	var copyErr error
	for range 4 {
		wg.Go(func() {
			for j := range jobs {
				raw, err := os.ReadFile(j.from)
				if err == nil {
					mode := fs.FileMode(0o644)
					if bytes.HasPrefix(raw, []byte("#!")) {
						// The module cache does not keep the executable bit.
						mode = 0o755
					}
					err = os.WriteFile(j.to, raw, mode)
				}
				if err != nil {
					once.Do(func() { copyErr = fmt.Errorf("copy sources: %w", err) })
				}
			}
		})
	}
	walk := func() error {
		for _, m := range t.Mounts {
			base := filepath.Join(dir, filepath.FromSlash(m.At))
			err := filepath.WalkDir(m.Dir, func(name string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				rel, err := filepath.Rel(m.Dir, name)
				if err != nil {
					return err
				}
				to := filepath.Join(base, rel)
				if d.IsDir() {
					return os.MkdirAll(to, 0o755)
				}
				jobs <- job{name, to}
				return nil
			})
			if err != nil {
				return fmt.Errorf("copy %s: %w", m.Module, err)
			}
		}
		return nil
	}
	err := walk()
	close(jobs)
	wg.Wait()
	return errors.Join(err, copyErr)
}

// sync makes the assembled tree equal to pristine plus overlay and returns how many files it had to write or remove.
func (r Repo) sync(t Tree, overlay Overlay) (int, error) {
	u := t.Upstream
	old := r.readState(u)
	desired := Overlay{}
	for _, p := range old.Touched {
		raw, err := readPristine(t, p)
		if err != nil {
			return 0, err
		}
		desired[p] = raw
	}
	for p, raw := range overlay {
		desired[p] = raw
	}
	// Written before the files, so that a crash in the middle is repaired by the next run.
	if err := r.writeState(u, treeState{Tree: old.Tree, Touched: desired.Paths()}); err != nil {
		return 0, err
	}
	changed := 0
	for _, p := range desired.Paths() {
		name := filepath.Join(r.Src(u), filepath.FromSlash(p))
		current, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return changed, fmt.Errorf("read assembled file: %w", err)
		}
		exists := err == nil
		want := desired[p]
		switch {
		case want == nil && exists:
			if err := os.Remove(name); err != nil {
				return changed, fmt.Errorf("remove assembled file: %w", err)
			}
		case want != nil && (!exists || !bytes.Equal(current, want)):
			if err := writeFile(name, want); err != nil {
				return changed, err
			}
		default:
			continue
		}
		changed++
	}
	return changed, r.writeState(u, treeState{Tree: old.Tree, Touched: overlay.Paths()})
}

// addReplaces notes which modules differ from pristine and where their sources are, relative to root.
func (t Tree) addReplaces(modules map[string]string, overlay Overlay, src, root string) {
	for p := range overlay {
		_, m := t.Source(p)
		dir, err := filepath.Rel(root, filepath.Join(src, filepath.FromSlash(m.At)))
		if err != nil {
			dir = filepath.Join(src, filepath.FromSlash(m.At))
		}
		if !strings.HasPrefix(dir, ".") {
			dir = "./" + dir
		} else {
			dir = "./" + filepath.ToSlash(dir)
		}
		modules[m.Module] = filepath.ToSlash(dir)
	}
}
