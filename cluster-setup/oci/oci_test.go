package oci

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

var stamp = time.Unix(1767225600, 0)

// entries lists a tar file's names and contents.
func entries(t *testing.T, path string) ([]string, map[string]string) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	in := tar.NewReader(file)
	var names []string
	contents := map[string]string{}
	for {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return names, contents
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
		contents[header.Name] = string(data)
		if header.ModTime.After(stamp) {
			t.Errorf("%s is from %s", header.Name, header.ModTime)
		}
	}
}

// tarOf writes a root file system as a builder would, with the given time on its files.
func tarOf(t *testing.T, when time.Time, files map[string]string, order ...string) string {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range order {
		header := &tar.Header{Name: "./" + name, Mode: 0o644, ModTime: when, Uname: "root", Size: int64(len(files[name])), Typeflag: tar.TypeReg}
		if name[len(name)-1] == '/' {
			header.Typeflag, header.Mode = tar.TypeDir, 0o755
		}
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "rootfs")
	if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNormalizeKeepsTheDifference(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	now := time.Now()
	base := tarOf(t, now, map[string]string{"etc/same": "1", "etc/changed": "1", "etc/gone": "1"}, "etc/", "etc/same", "etc/changed", "etc/gone", "old/", "old/file")
	full := tarOf(t, now.Add(time.Hour), map[string]string{"etc/same": "1", "etc/changed": "2", "etc/new": "3"}, "etc/", "etc/same", "etc/changed", "etc/new", "dev/", "dev/null")
	if _, err := Normalize(filepath.Join(dir, "upper"), full, base, stamp); err != nil {
		t.Fatal(err)
	}
	names, contents := entries(t, filepath.Join(dir, "upper"))
	want := []string{"etc/changed", "etc/new", "dev/", "etc/.wh.gone", ".wh.old"}
	if !reflect.DeepEqual(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
	if contents["etc/changed"] != "2" {
		t.Errorf("etc/changed holds %q", contents["etc/changed"])
	}
}

func TestSameInputGivesSameBytes(t *testing.T) {
	t.Parallel()
	build := func(when time.Time) string {
		dir := t.TempDir()
		base, err := Normalize(filepath.Join(dir, "base"), tarOf(t, when, map[string]string{"a": "1"}, "etc/", "a"), "", stamp)
		if err != nil {
			t.Fatal(err)
		}
		files, err := WriteFiles(filepath.Join(dir, "files"), map[string]File{
			"/usr/local/bin/x": {Content: []byte("x"), Mode: 0o755}, "/etc/y": {Content: []byte("y"), Mode: 0o644},
		}, stamp)
		if err != nil {
			t.Fatal(err)
		}
		digest, err := Write(filepath.Join(dir, "image.tar"), Image{Ref: "podmig.dev/x:v1", Layers: []Layer{base, files}, Created: stamp})
		if err != nil {
			t.Fatal(err)
		}
		archive, err := OpenLayer(filepath.Join(dir, "image.tar"))
		if err != nil {
			t.Fatal(err)
		}
		return digest + " " + archive.Digest
	}
	if one, two := build(time.Now()), build(time.Now().Add(time.Hour)); one != two {
		t.Errorf("two builds differ:\n%s\n%s", one, two)
	}
}

func TestArchiveIsAnImageLayout(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	layer, err := WriteFiles(filepath.Join(dir, "layer"), map[string]File{"/app": {Content: []byte("x"), Mode: 0o755}}, stamp)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "image.tar")
	digest, err := Write(path, Image{
		Ref: "podmig.dev/app:v1", Layers: []Layer{layer}, Created: stamp, Config: Config{Entrypoint: []string{"/app"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, contents := entries(t, path)
	var index struct{ Manifests []descriptor }
	decode(t, contents["index.json"], &index)
	if len(index.Manifests) != 1 || index.Manifests[0].Digest != digest || index.Manifests[0].Annotations["io.containerd.image.name"] != "podmig.dev/app:v1" {
		t.Fatalf("unexpected index %+v", index)
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	decode(t, contents[blobName(digest)], &manifest)
	var config struct {
		Config Config
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	decode(t, contents[blobName(manifest.Config.Digest)], &config)
	if config.RootFS.DiffIDs[0] != layer.Digest || manifest.Layers[0].Digest != layer.Digest || config.Config.Entrypoint[0] != "/app" {
		t.Errorf("unexpected image %+v %+v", manifest, config)
	}
	if int64(len(contents[blobName(layer.Digest)])) != layer.Size {
		t.Error("the layer is incomplete")
	}
}

func decode(t *testing.T, data string, value any) {
	t.Helper()
	if err := json.Unmarshal([]byte(data), value); err != nil {
		t.Fatalf("decode %q: %v", data, err)
	}
}
