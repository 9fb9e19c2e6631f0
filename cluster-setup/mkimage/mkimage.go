// Package mkimage builds the container images of the demos and tests: Debian packages on one shared base layer, or a static Go
// program alone.
//
// What an image consists of is said by the file image.yaml in its folder below cluster-setup/images. Layers are kept in a cache and
// made again when their description changes. There is no registry and nothing is pulled: an image is an archive to import.
package mkimage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	"podmig.dev/podmig/cluster-setup/debian"
	"podmig.dev/podmig/cluster-setup/oci"
)

// Description is the content of an image.yaml.
type Description struct {
	// Packages of Debian. Exactly one of Packages, Go and Binary says where the content comes from.
	Packages []string `json:"packages,omitempty"`
	// Go means that the folder holds a Go program; it becomes /NAME, the entry point.
	Go bool `json:"go,omitempty"`
	// Binary names a program of the binary folder that becomes /NAME, the entry point.
	Binary string `json:"binary,omitempty"`
	// Modes of the files in the folder's rootfs, by absolute path; others get 0644.
	Modes      map[string]uint32 `json:"modes,omitempty"`
	User       string            `json:"user,omitempty"`
	Env        []string          `json:"env,omitempty"`
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
	WorkingDir string            `json:"workingDir,omitempty"`
	StopSignal string            `json:"stopSignal,omitempty"`
}

// Builder builds images.
type Builder struct {
	Sources string // The folder of the images' folders.
	Output  string // Where archives go: NAME.tar.
	Cache   string // Where layers are kept.
	Bin     string // The binary folder.
	Mirror  string // Of Debian; empty asks the package manager.
}

// Ref is the name under which an image is imported.
func Ref(name string) string { return "podmig.dev/" + name + ":v1" }

// Names lists the images there are descriptions of.
func (b Builder) Names() ([]string, error) {
	found, err := filepath.Glob(filepath.Join(b.Sources, "*", "image.yaml"))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var names []string
	for _, file := range found {
		names = append(names, filepath.Base(filepath.Dir(file)))
	}
	return names, nil
}

// Built is a finished image.
type Built struct {
	Name, Archive, Digest string
	Took                  time.Duration
}

// atOnce is how many images are built side by side: fetching packages is mostly waiting.
const atOnce = 3

// BuildAll makes several images and reports each when it is finished. What they share is made first.
func (b Builder) BuildAll(ctx context.Context, names []string, report func(Built)) error {
	for _, name := range names {
		description, err := b.read(name)
		if err != nil {
			return err
		}
		if len(description.Packages) > 0 {
			if _, _, err := b.base(ctx); err != nil {
				return err
			}
		}
	}
	var one sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for _, name := range names {
		group.Go(func() error {
			began := time.Now()
			archive, digest, err := b.Build(ctx, name)
			if err != nil {
				return err
			}
			one.Lock()
			defer one.Unlock()
			report(Built{Name: name, Archive: archive, Digest: digest, Took: time.Since(began)})
			return nil
		})
	}
	return group.Wait()
}

// Build makes the archive of one image and returns its path and the digest of its manifest.
func (b Builder) Build(ctx context.Context, name string) (archive, digest string, err error) {
	description, err := b.read(name)
	if err != nil {
		return "", "", err
	}
	for _, dir := range []string{b.Output, b.Cache} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", "", fmt.Errorf("build image %s: %w", name, err)
		}
	}
	layers, err := b.layers(ctx, name, description)
	if err != nil {
		return "", "", fmt.Errorf("build image %s: %w", name, err)
	}
	extra, err := b.extra(name, description)
	if err != nil {
		return "", "", fmt.Errorf("build image %s: %w", name, err)
	}
	entrypoint := description.Entrypoint
	if len(entrypoint) == 0 {
		entrypoint = []string{"/" + name}
	}
	env := append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, description.Env...)
	archive = filepath.Join(b.Output, name+".tar")
	digest, err = oci.Write(archive, oci.Image{
		Ref: Ref(name), Layers: append(layers, extra...), Created: debian.Stamp,
		Config: oci.Config{
			User: description.User, Env: env, Entrypoint: entrypoint, Cmd: description.Cmd,
			WorkingDir: description.WorkingDir, StopSignal: description.StopSignal,
		},
	})
	return archive, digest, err
}

func (b Builder) read(name string) (Description, error) {
	var description Description
	content, err := os.ReadFile(filepath.Join(b.Sources, name, "image.yaml"))
	if errors.Is(err, fs.ErrNotExist) {
		known, _ := b.Names()
		return description, fmt.Errorf("no image %q in %s: there are %s", name, b.Sources, strings.Join(known, ", "))
	}
	if err != nil {
		return description, fmt.Errorf("read image %s: %w", name, err)
	}
	if err := yaml.UnmarshalStrict(content, &description); err != nil {
		return description, fmt.Errorf("read image %s: %w", name, err)
	}
	return description, description.check(name)
}

func (d Description) check(name string) error {
	kinds := 0
	for _, given := range []bool{len(d.Packages) > 0, d.Go, d.Binary != ""} {
		if given {
			kinds++
		}
	}
	if kinds != 1 {
		return fmt.Errorf("image %s: give exactly one of packages, go and binary", name)
	}
	if len(d.Packages) > 0 && len(d.Entrypoint) == 0 {
		return fmt.Errorf("image %s: packages need an entrypoint", name)
	}
	return nil
}

func (b Builder) layers(ctx context.Context, name string, d Description) ([]oci.Layer, error) {
	switch {
	case d.Go:
		program := filepath.Join(b.Cache, name+".program")
		if err := compile(ctx, filepath.Join(b.Sources, name), program); err != nil {
			return nil, err
		}
		defer os.Remove(program)
		return b.program(name, program)
	case d.Binary != "":
		return b.program(name, filepath.Join(b.Bin, d.Binary))
	default:
		return b.debian(ctx, d.Packages)
	}
}

func (b Builder) program(name, source string) ([]oci.Layer, error) {
	layer, err := oci.WriteFiles(filepath.Join(b.Cache, name+".layer"), map[string]oci.File{
		"/" + name: {Source: source, Mode: 0o755},
	}, debian.Stamp)
	return []oci.Layer{layer}, err
}

// compile builds a static program that depends on nothing but its source.
func compile(ctx context.Context, dir, target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return fmt.Errorf("compile: %w", err)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", target, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("compile: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// base returns the root file system and the layer that all images of Debian packages share.
func (b Builder) base(ctx context.Context) (string, oci.Layer, error) {
	rootfs, err := debian.RootFS{Variant: variant, Mirror: b.Mirror}.Cached(ctx, b.Cache)
	if err != nil {
		return "", oci.Layer{}, err
	}
	layer, err := oci.NormalizeOnce(layerPath(rootfs), rootfs, "", debian.Stamp)
	return rootfs, layer, err
}

// variant without a package manager: nothing is installed later.
const variant = "essential"

// debian returns the shared base layer and the layer of what the packages add to it.
func (b Builder) debian(ctx context.Context, packages []string) ([]oci.Layer, error) {
	base, lower, err := b.base(ctx)
	if err != nil {
		return nil, err
	}
	full, err := debian.RootFS{Variant: variant, Packages: packages, Mirror: b.Mirror}.Cached(ctx, b.Cache)
	if err != nil {
		return nil, err
	}
	upper, err := oci.NormalizeOnce(layerPath(full), full, base, debian.Stamp)
	if err != nil {
		return nil, err
	}
	return []oci.Layer{lower, upper}, nil
}

func layerPath(rootfs string) string { return strings.TrimSuffix(rootfs, debian.Extension) + ".layer" }

// extra returns a layer of the files in the image's rootfs folder, if it has one.
func (b Builder) extra(name string, d Description) ([]oci.Layer, error) {
	root := filepath.Join(b.Sources, name, "rootfs")
	files := map[string]oci.File{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		inside := strings.TrimPrefix(path, root)
		mode := fs.FileMode(0o644)
		if given, ok := d.Modes[inside]; ok {
			mode = fs.FileMode(given)
		}
		files[inside] = oci.File{Source: path, Mode: mode}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	layer, err := oci.WriteFiles(filepath.Join(b.Cache, name+".files.layer"), files, debian.Stamp)
	return []oci.Layer{layer}, err
}
