package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"syscall"
	"time"

	"podmig.dev/podmig/tools/patchq"
)

// heartbeat is how often a long step says that it is alive.
const heartbeat = 30 * time.Second

// stepTimeout bounds one call of the Go tool; the longest takes about seven minutes from an empty cache.
const stepTimeout = time.Hour

// Options choose what Run does.
type Options struct {
	Repo patchq.Repo
	// Force runs every step even if nothing changed.
	Force bool
	// Only names the one step to run, for a developer in a hurry; empty means all.
	Only string
}

// Run assembles the patched sources and brings .build/bin up to date. Runs of several processes wait for each other.
func Run(ctx context.Context, o Options) error {
	start := time.Now()
	repo := o.Repo
	if err := os.MkdirAll(filepath.Join(repo.Root, ".build", "log"), 0o755); err != nil {
		return fmt.Errorf("make build folder: %w", err)
	}
	unlock, err := lock(filepath.Join(repo.Root, ".build", ".build.lock"))
	if err != nil {
		return err
	}
	defer unlock()

	if err := repo.Assemble(); err != nil {
		return err
	}
	sources, err := hashSources(repo.Root)
	if err != nil {
		return err
	}
	stamp := filepath.Join(repo.Root, ".build", "bin", ".stamp")
	if old, err := os.ReadFile(stamp); err == nil && !o.Force && o.Only == "" && upToDate(repo.Root, sources, string(old)) {
		fmt.Fprintf(repo.Log, "build: nothing changed (%.1fs)\n", time.Since(start).Seconds())
		return nil
	}
	v, err := readVersions(repo)
	if err != nil {
		return err
	}
	steps, err := plan(repo.Root, v)
	if err != nil {
		return err
	}
	only := slices.IndexFunc(steps, func(s step) bool { return s.name == o.Only })
	if o.Only != "" && only < 0 {
		return fmt.Errorf("there is no build step %q", o.Only)
	}
	if o.Only == "" || !steps[only].onDemand {
		if err := os.Remove(stamp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove old stamp: %w", err)
		}
	}
	fmt.Fprintf(repo.Log, "build: kubernetes %s, containerd %s, runc %s (details in .build/log)\n",
		v["kubernetes"].text, v["containerd"].text, v["runc"].text)
	if o.Only != "" {
		return steps[only].run(ctx, repo.Root, repo.Log)
	}
	var failed []error
	var binaries, extra []string
	for _, s := range steps {
		if s.onDemand {
			extra = append(extra, s.binaries...)
			continue
		}
		if err := s.run(ctx, repo.Root, repo.Log); err != nil {
			failed = append(failed, err)
		}
		binaries = append(binaries, s.binaries...)
	}
	if len(failed) > 0 {
		return errors.Join(failed...)
	}
	if err := removeStrangers(filepath.Join(repo.Root, ".build", "bin"), slices.Concat(binaries, extra)); err != nil {
		return err
	}
	text := sources + "\n" + strings.Join(binaries, "\n") + "\n"
	if err := os.WriteFile(stamp, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write stamp: %w", err)
	}
	fmt.Fprintf(repo.Log, "build: %d binaries in .build/bin (%.1fs)\n", len(binaries), time.Since(start).Seconds())
	return nil
}

// upToDate says whether a stamp is of these sources and all binaries it lists are there.
func upToDate(root, sources, stamp string) bool {
	lines := strings.Split(strings.TrimSpace(stamp), "\n")
	if lines[0] != sources {
		return false
	}
	for _, name := range lines[1:] {
		if _, err := os.Stat(filepath.Join(root, ".build", "bin", name)); err != nil {
			return false
		}
	}
	return true
}

// removeStrangers deletes programs that are no longer built, so that an image never contains an old one.
func removeStrangers(dir string, binaries []string) error {
	known := map[string]bool{}
	for _, b := range binaries {
		known[b] = true
	}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil || known[filepath.ToSlash(rel)] {
			return err
		}
		return os.Remove(name)
	})
	if err != nil {
		return fmt.Errorf("remove old binaries: %w", err)
	}
	return nil
}

// run calls the Go tool. It does not link again what is already linked from the same inputs, because the Go tool
// recognises its own output.
func (s step) run(ctx context.Context, root string, log io.Writer) error {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	bin := filepath.Join(root, ".build", "bin", s.folder) + string(filepath.Separator)
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return fmt.Errorf("make binary folder: %w", err)
	}
	args := append([]string{"build", "-trimpath", "-buildvcs=false"}, s.args...)
	args = append(args, "-o", bin+s.rename)
	args = append(args, s.packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(root, s.dir)
	cmd.Env = append(append(os.Environ(), "GOWORK=off"), s.env...)
	logName := filepath.Join(".build", "log", "build-"+s.name+".log")
	file, err := os.Create(filepath.Join(root, logName))
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer file.Close()
	fmt.Fprintf(file, "%s go %s\n", strings.Join(s.env, " "), strings.Join(args, " "))
	cmd.Stdout, cmd.Stderr = file, file
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the Go tool: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("build %s: %w\n%s(all of it in %s)", s.name, err, tail(filepath.Join(root, logName)), logName)
			}
			fmt.Fprintf(log, "  build %-10s %2d binaries (%.1fs)\n", s.name, len(s.binaries), time.Since(start).Seconds())
			return nil
		case <-ticker.C:
			fmt.Fprintf(log, "  build %-10s still compiling (%.0fs)\n", s.name, time.Since(start).Seconds())
		}
	}
}

// tail returns the end of a log for an error message.
func tail(name string) string {
	raw, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	// The first line is the command, which is long and of no use here.
	lines := strings.SplitAfter(string(raw), "\n")[1:]
	if len(lines) > 30 {
		lines = lines[len(lines)-30:]
	}
	return strings.Join(lines, "")
}

// hashSources is a hash of everything a build reads: the Go version, our Go files with what they embed, the module
// files and the assembled upstream trees.
func hashSources(root string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), os.Getenv("GOFLAGS"), os.Getenv("GOAMD64"))
	assembled, err := os.ReadFile(filepath.Join(root, ".build", "src", ".stamp"))
	if err != nil {
		return "", fmt.Errorf("read stamp of the assembled sources: %w", err)
	}
	h.Write(assembled)
	var names []string
	for _, top := range []string{"cri-api", "kubelet", "containerd-cri", "tools", "cluster-setup"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && name == filepath.Join(root, top) {
				return nil
			}
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == "testdata" {
				return filepath.SkipDir
			}
			if d.Type().IsRegular() && !strings.HasSuffix(name, "_test.go") && filepath.Ext(name) != ".md" {
				names = append(names, name)
			}
			return nil
		})
		if err != nil {
			return "", fmt.Errorf("list sources: %w", err)
		}
	}
	sort.Strings(names)
	for _, n := range names {
		raw, err := os.ReadFile(n)
		if err != nil {
			return "", fmt.Errorf("read sources: %w", err)
		}
		fmt.Fprintf(h, "%s %d\n", n, len(raw))
		h.Write(raw)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func lock(name string) (func(), error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open build lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("take build lock: %w", err)
	}
	return func() { f.Close() }, nil
}
