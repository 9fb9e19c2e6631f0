// Package oci writes container images: layers as plain tar files, an image as an OCI layout in one archive.
//
// The same input gives the same bytes: names, order and times come from the caller, never from the clock. It writes only; reading,
// pulling and pushing are the business of container runtimes.
package oci

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"
)

// Layer is an uncompressed tar file. Without compression its digest is also its diff ID, and importing it costs no processor time;
// the archives never travel far.
type Layer struct {
	Path   string
	Digest string
	Size   int64
}

// Image is what goes into an archive.
type Image struct {
	Ref    string // Name and tag under which a runtime will know it.
	Layers []Layer
	Config Config
	// Created is written into the image; it must not depend on the clock.
	Created time.Time
}

// Config is the part of an image's configuration that we use.
type Config struct {
	User         string              `json:"User,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   []string            `json:"Entrypoint,omitempty"`
	Cmd          []string            `json:"Cmd,omitempty"`
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
	StopSignal   string              `json:"StopSignal,omitempty"`
}

// OpenLayer describes a finished tar file.
func OpenLayer(path string) (Layer, error) {
	file, err := os.Open(path)
	if err != nil {
		return Layer{}, fmt.Errorf("open layer: %w", err)
	}
	defer file.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, file)
	if err != nil {
		return Layer{}, fmt.Errorf("read layer: %w", err)
	}
	return Layer{Path: path, Digest: digest(hash.Sum(nil)), Size: size}, nil
}

func digest(sum []byte) string { return "sha256:" + hex.EncodeToString(sum) }

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const (
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
)

// Write writes the image as an archive and returns the digest of its manifest.
func Write(path string, image Image) (string, error) {
	file, err := os.CreateTemp(dirOf(path), ".image-*")
	if err != nil {
		return "", fmt.Errorf("write image: %w", err)
	}
	defer os.Remove(file.Name())
	defer file.Close()
	name, err := write(file, image)
	if err != nil {
		return "", fmt.Errorf("write image %s: %w", image.Ref, err)
	}
	if err := file.Chmod(0o644); err != nil {
		return "", fmt.Errorf("write image: %w", err)
	}
	if err := file.Close(); err != nil {
		return "", fmt.Errorf("write image: %w", err)
	}
	// A file that stays as it is keeps its time, by which others know that nothing has changed.
	made, err := OpenLayer(file.Name())
	if err != nil {
		return "", err
	}
	if before, err := OpenLayer(path); err == nil && before.Digest == made.Digest {
		return name, nil
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return "", fmt.Errorf("write image: %w", err)
	}
	return name, nil
}

func write(out io.Writer, image Image) (string, error) {
	archive := &archive{tar: tar.NewWriter(out), written: map[string]bool{}}
	var layers []descriptor
	var diffs []string
	for _, layer := range image.Layers {
		layers = append(layers, descriptor{MediaType: typeLayer, Digest: layer.Digest, Size: layer.Size})
		diffs = append(diffs, layer.Digest)
	}
	config, err := archive.addJSON(typeConfig, map[string]any{
		"created": image.Created.UTC().Format(time.RFC3339), "architecture": "amd64", "os": "linux",
		"config": image.Config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
	if err != nil {
		return "", err
	}
	manifest, err := archive.addJSON(typeManifest, map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest, "config": config, "layers": layers,
	})
	if err != nil {
		return "", err
	}
	for _, layer := range image.Layers {
		if err := archive.addLayer(layer); err != nil {
			return "", err
		}
	}
	manifest.Annotations = map[string]string{"io.containerd.image.name": image.Ref, "org.opencontainers.image.ref.name": image.Ref}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": []descriptor{manifest}})
	if err != nil {
		return "", err
	}
	if err := archive.add("index.json", int64(len(index)), bytes.NewReader(index)); err != nil {
		return "", err
	}
	const layout = `{"imageLayoutVersion":"1.0.0"}`
	if err := archive.add("oci-layout", int64(len(layout)), bytes.NewReader([]byte(layout))); err != nil {
		return "", err
	}
	return manifest.Digest, archive.tar.Close()
}

type archive struct {
	tar     *tar.Writer
	written map[string]bool
}

func (a *archive) add(name string, size int64, content io.Reader) error {
	if a.written[name] {
		return nil
	}
	a.written[name] = true
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
	if err := a.tar.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(a.tar, content)
	return err
}

func (a *archive) addJSON(mediaType string, value any) (descriptor, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return descriptor{}, err
	}
	sum := sha256.Sum256(data)
	d := descriptor{MediaType: mediaType, Digest: digest(sum[:]), Size: int64(len(data))}
	return d, a.add(blobName(d.Digest), d.Size, bytes.NewReader(data))
}

func (a *archive) addLayer(layer Layer) error {
	file, err := os.Open(layer.Path)
	if err != nil {
		return err
	}
	defer file.Close()
	return a.add(blobName(layer.Digest), layer.Size, file)
}

func blobName(digest string) string { return "blobs/sha256/" + digest[len("sha256:"):] }
