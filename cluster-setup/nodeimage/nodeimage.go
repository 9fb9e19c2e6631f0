// Package nodeimage builds the image of a node: Debian with CRIU and the network tools, and on top the binaries, configuration files
// and units of podmig.
//
// The two parts are layers of their own, so that a rebuilt kubelet does not rebuild Debian. The same image comes out as an unpacked
// folder of the Debian part (for the local cluster, which binds the binaries), as one root file system tarball and as an OCI image.
// It installs nothing on a host; the README of cluster-setup says how an operator does that.
package nodeimage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"podmig.dev/podmig/cluster-setup/debian"
	"podmig.dev/podmig/cluster-setup/nodeconfig"
	"podmig.dev/podmig/cluster-setup/oci"
)

// packages of the Debian part.
var packages = []string{
	"ca-certificates", "conntrack", "criu", "ethtool", "iproute2", "iptables", "kmod", "mount", "nftables", "procps", "util-linux",
}

// Binaries of a node and where they belong. The network plugins are those that the CNI configuration names.
var (
	binaries = []string{"containerd", "containerd-shim-runc-v2", "ctr", "kube-proxy", "kubelet", "runc"}
	plugins  = []string{"bridge", "host-local", "loopback", "portmap", "ptp"}
)

// Ref is the image's name.
const Ref = "podmig.dev/node:v1"

// Builder builds the image.
type Builder struct {
	Dir    string // Where everything goes.
	Bin    string // The binary folder.
	Mirror string // Of Debian; empty asks the package manager.
	// Values of the configuration files; the zero value of a field leaves out what a cluster brings itself.
	Values nodeconfig.Values
}

// RootFS makes the unpacked Debian part and returns the link that leads to its current version.
func (b Builder) RootFS(ctx context.Context) (string, error) {
	layer, err := b.debian(ctx)
	if err != nil {
		return "", err
	}
	link := filepath.Join(b.Dir, "rootfs")
	name := "rootfs-" + strings.TrimPrefix(layer.Digest, "sha256:")[:12]
	target := filepath.Join(b.Dir, name)
	if _, err := os.Stat(target); errors.Is(err, os.ErrNotExist) {
		if err := unpack(ctx, layer.Path, target); err != nil {
			return "", err
		}
	}
	if current, err := os.Readlink(link); err == nil && current == name {
		return link, nil
	}
	// A running cluster keeps the version it was started with.
	if err := os.RemoveAll(link + ".new"); err != nil {
		return "", fmt.Errorf("link root file system: %w", err)
	}
	if err := os.Symlink(name, link+".new"); err != nil {
		return "", fmt.Errorf("link root file system: %w", err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		return "", fmt.Errorf("link root file system: %w", err)
	}
	return link, nil
}

func unpack(ctx context.Context, source, target string) error {
	partial := target + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return fmt.Errorf("unpack root file system: %w", err)
	}
	defer os.RemoveAll(partial)
	if err := os.MkdirAll(partial, 0o755); err != nil {
		return fmt.Errorf("unpack root file system: %w", err)
	}
	cmd := exec.CommandContext(ctx, "tar", "--extract", "--file", source, "--directory", partial, "--numeric-owner", "--preserve-permissions", "--xattrs", "--xattrs-include=*")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("unpack root file system: %w: %s", err, strings.TrimSpace(string(out)))
	}
	if err := os.Rename(partial, target); err != nil {
		return fmt.Errorf("unpack root file system: %w", err)
	}
	return nil
}

// Image is what Build made.
type Image struct {
	Tarball       string
	TarballDigest string
	Archive       string
	Digest        string
}

// Build makes the tarball and the OCI image of the whole node.
func (b Builder) Build(ctx context.Context) (Image, error) {
	base, err := b.debian(ctx)
	if err != nil {
		return Image{}, err
	}
	pieces, err := b.pieces()
	if err != nil {
		return Image{}, err
	}
	image := Image{Tarball: filepath.Join(b.Dir, "node.rootfs.tar"), Archive: filepath.Join(b.Dir, "node.oci.tar")}
	layers := []oci.Layer{base, pieces}
	whole, err := oci.Concat(image.Tarball, layers)
	if err != nil {
		return Image{}, err
	}
	image.TarballDigest = whole.Digest
	image.Digest, err = oci.Write(image.Archive, oci.Image{
		Ref: Ref, Layers: layers, Created: debian.Stamp,
		Config: oci.Config{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"/bin/sh"}},
	})
	return image, err
}

func (b Builder) debian(ctx context.Context) (oci.Layer, error) {
	rootfs, err := debian.RootFS{Variant: "minbase", Packages: packages, Mirror: b.Mirror}.Cached(ctx, b.Dir)
	if err != nil {
		return oci.Layer{}, err
	}
	return oci.NormalizeOnce(strings.TrimSuffix(rootfs, debian.Extension)+".layer", rootfs, "", debian.Stamp)
}

// pieces is the layer of everything that is ours.
func (b Builder) pieces() (oci.Layer, error) {
	files := map[string]oci.File{}
	for _, name := range binaries {
		files["/usr/local/bin/"+name] = oci.File{Source: filepath.Join(b.Bin, name), Mode: 0o755}
	}
	cni := filepath.Join(b.Bin, "cni")
	if _, err := os.Stat(cni); errors.Is(err, os.ErrNotExist) {
		cni = b.Bin
	}
	for _, name := range plugins {
		files["/opt/cni/bin/"+name] = oci.File{Source: filepath.Join(cni, name), Mode: 0o755}
	}
	rendered, err := nodeconfig.Render(b.Values)
	if err != nil {
		return oci.Layer{}, err
	}
	for _, file := range rendered {
		files[file.Path] = oci.File{Content: file.Content, Mode: file.Mode}
	}
	return oci.WriteFiles(filepath.Join(b.Dir, "pieces.layer"), files, debian.Stamp)
}
