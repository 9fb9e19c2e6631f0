// Package debian makes root file systems of Debian packages. It is a thin layer over mmdebstrap: which packages, from where, and
// with a fixed clock, so that the same package index gives the same bytes.
package debian

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Suite is the release everything is made of: the first whose CRIU understands the sockets of current kernels.
const Suite = "forky"

// Stamp is the time of all files, so that it does not depend on when an image is built.
var Stamp = time.Unix(1767225600, 0) // The first day of 2026.

// RootFS describes a root file system.
type RootFS struct {
	Variant  string // Of mmdebstrap: "essential" has no package manager, "minbase" has.
	Packages []string
	Mirror   string // Empty: the mirror that this machine's own package manager uses.
}

// Build writes the root file system as a tar file.
func (r RootFS) Build(ctx context.Context, target string) error {
	mirror := r.Mirror
	if mirror == "" {
		var err error
		if mirror, err = Mirror(ctx); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return fmt.Errorf("build root file system: %w", err)
	}
	partial := target + ".partial"
	defer os.Remove(partial)
	args := []string{
		"--variant=" + r.Variant, "--format=tar",
		// A mirror may be a frozen copy whose index has formally expired.
		`--aptopt=Acquire::Check-Valid-Until "false"`,
		`--aptopt=Acquire::Languages "none"`,
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
	}
	if len(r.Packages) > 0 {
		args = append(args, "--include="+strings.Join(slices.Sorted(slices.Values(r.Packages)), ","))
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(args, Suite, partial, mirror)...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", Stamp.Unix()), "LC_ALL=C")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	// Asked kindly first: it removes its temporary folder on the way out.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("build root file system: %w: install the package mmdebstrap", err)
		}
		return fmt.Errorf("build root file system of %v: %w: %s", r.Packages, err, strings.TrimSpace(log.String()))
	}
	if err := os.Rename(partial, target); err != nil {
		return fmt.Errorf("build root file system: %w", err)
	}
	return nil
}

// Extension of cached root file systems.
const Extension = ".rootfs"

// Cached returns the root file system from a folder, and builds it when none of the same description is there.
func (r RootFS) Cached(ctx context.Context, dir string) (string, error) {
	// The mirror is left out: where a package comes from does not change what it is.
	described, err := json.Marshal([]any{Suite, r.Variant, slices.Sorted(slices.Values(r.Packages))})
	if err != nil {
		return "", fmt.Errorf("name root file system: %w", err)
	}
	sum := sha256.Sum256(described)
	target := filepath.Join(dir, "debian-"+hex.EncodeToString(sum[:6])+Extension)
	if _, err := os.Stat(target); err == nil {
		return target, nil
	}
	return target, r.Build(ctx, target)
}

// Mirror asks this machine's package manager where it gets Debian from.
func Mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(CREATED_BY) $(ORIGIN) $(LABEL) $(REPO_URI)").Output()
	if err != nil {
		return "", fmt.Errorf("ask apt for its mirror: %w: name one with --mirror", err)
	}
	return parseMirror(string(out))
}

func parseMirror(targets string) (string, error) {
	for line := range strings.Lines(targets) {
		fields := strings.Fields(line)
		// Security updates have a label of their own and another archive.
		if len(fields) == 4 && fields[0] == "Packages" && fields[1] == "Debian" && fields[2] == "Debian" {
			return fields[3], nil
		}
	}
	return "", errors.New("this machine has no Debian package source: run apt-get update, or name a mirror with --mirror")
}
