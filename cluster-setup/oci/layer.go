package oci

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func dirOf(path string) string { return filepath.Dir(path) }

// File is a regular file to put into a layer. Exactly one of Source and Content is used.
type File struct {
	Source  string
	Content []byte
	Mode    fs.FileMode
}

// WriteFiles writes a layer of the given files, keyed by absolute path, with the folders above them. All belong to root and have
// the given time.
func WriteFiles(target string, files map[string]File, stamp time.Time) (Layer, error) {
	return create(target, func(out *tar.Writer) error {
		seen := map[string]bool{}
		for _, name := range slices.Sorted(maps.Keys(files)) {
			relative := strings.TrimPrefix(path.Clean(name), "/")
			if err := writeParents(out, relative, seen, stamp); err != nil {
				return err
			}
			if err := writeFile(out, relative, files[name], stamp); err != nil {
				return err
			}
		}
		return nil
	})
}

func writeParents(out *tar.Writer, name string, seen map[string]bool, stamp time.Time) error {
	dir := path.Dir(name)
	if dir == "." || seen[dir] {
		return nil
	}
	if err := writeParents(out, dir, seen, stamp); err != nil {
		return err
	}
	seen[dir] = true
	return out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: stamp})
}

func writeFile(out *tar.Writer, name string, file File, stamp time.Time) error {
	content, size := io.Reader(bytes.NewReader(file.Content)), int64(len(file.Content))
	if file.Source != "" {
		source, err := os.Open(file.Source)
		if err != nil {
			return err
		}
		defer source.Close()
		info, err := source.Stat()
		if err != nil {
			return err
		}
		content, size = source, info.Size()
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: int64(file.Mode.Perm()), ModTime: stamp}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(out, content)
	return err
}

// fingerprint is what makes two entries the same to a runtime.
type fingerprint struct {
	kind     byte
	mode     int64
	uid, gid int
	link     string
	major    int64
	minor    int64
	content  [sha256.Size]byte
}

// Normalize copies a tar file into a layer: plain names, no user names, no times later than the stamp, and nothing below the
// folders whose content every container mounts anew. With a base it keeps only what the base does not have, and whiteouts for what
// the base has in addition.
func Normalize(target, source, base string, stamp time.Time) (Layer, error) {
	var have map[string]fingerprint
	if base != "" {
		var err error
		if have, err = fingerprints(base); err != nil {
			return Layer{}, err
		}
	}
	return create(target, func(out *tar.Writer) error {
		kept := map[string]bool{}
		err := walk(source, func(header *tar.Header, content io.Reader) error {
			name := strings.TrimSuffix(header.Name, "/")
			kept[name] = true
			data, err := io.ReadAll(content)
			if err != nil {
				return err
			}
			if old, ok := have[name]; ok && old == fingerprintOf(header, data) {
				return nil
			}
			clean := &tar.Header{
				Typeflag: header.Typeflag, Name: header.Name, Linkname: header.Linkname, Size: header.Size, Mode: header.Mode,
				Uid: header.Uid, Gid: header.Gid, Devmajor: header.Devmajor, Devminor: header.Devminor, ModTime: stamp,
			}
			// File capabilities and the like are attributes that matter; times beyond the modification time are not.
			for key, value := range header.PAXRecords {
				if strings.HasPrefix(key, "SCHILY.xattr.") {
					if clean.PAXRecords == nil {
						clean.PAXRecords = map[string]string{}
					}
					clean.PAXRecords[key] = value
				}
			}
			if header.ModTime.Before(stamp) {
				clean.ModTime = header.ModTime.Truncate(time.Second)
			}
			if err := out.WriteHeader(clean); err != nil {
				return err
			}
			_, err = out.Write(data)
			return err
		})
		if err != nil {
			return err
		}
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if kept[name] || !kept[path.Dir(name)] && path.Dir(name) != "." {
				continue // Present, or gone together with its folder.
			}
			whiteout := path.Join(path.Dir(name), ".wh."+path.Base(name))
			if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: whiteout, Mode: 0o644, ModTime: stamp}); err != nil {
				return err
			}
		}
		return nil
	})
}

// NormalizeOnce is Normalize, unless the target is there already.
func NormalizeOnce(target, source, base string, stamp time.Time) (Layer, error) {
	if _, err := os.Stat(target); err == nil {
		return OpenLayer(target)
	}
	return Normalize(target, source, base, stamp)
}

// Concat writes one tar file with the content of all layers, later ones covering earlier ones when it is unpacked.
func Concat(target string, layers []Layer) (Layer, error) {
	return create(target, func(out *tar.Writer) error {
		for _, layer := range layers {
			err := walkAll(layer.Path, func(header *tar.Header, content io.Reader) error {
				if err := out.WriteHeader(header); err != nil {
					return err
				}
				_, err := io.Copy(out, content)
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// mountedAnew are the folders of which an image needs only the folder.
var mountedAnew = []string{"dev/", "proc/", "sys/", "run/", "tmp/"}

// walk visits the entries that belong into a layer, under plain names.
func walk(source string, visit func(*tar.Header, io.Reader) error) error {
	return walkAll(source, func(header *tar.Header, content io.Reader) error {
		header.Name = strings.TrimPrefix(header.Name, "./")
		if header.Typeflag == tar.TypeLink {
			header.Linkname = strings.TrimPrefix(header.Linkname, "./")
		}
		inside := func(dir string) bool { return strings.HasPrefix(header.Name, dir) && header.Name != dir }
		if header.Name == "" || slices.ContainsFunc(mountedAnew, inside) {
			return nil
		}
		return visit(header, content)
	})
}

func walkAll(source string, visit func(*tar.Header, io.Reader) error) error {
	file, err := os.Open(source)
	if err != nil {
		return err
	}
	defer file.Close()
	in := tar.NewReader(file)
	for {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", source, err)
		}
		if err := visit(header, in); err != nil {
			return err
		}
	}
}

func fingerprints(source string) (map[string]fingerprint, error) {
	found := map[string]fingerprint{}
	err := walk(source, func(header *tar.Header, content io.Reader) error {
		data, err := io.ReadAll(content)
		if err != nil {
			return err
		}
		found[strings.TrimSuffix(header.Name, "/")] = fingerprintOf(header, data)
		return nil
	})
	return found, err
}

func fingerprintOf(header *tar.Header, data []byte) fingerprint {
	return fingerprint{
		kind: header.Typeflag, mode: header.Mode, uid: header.Uid, gid: header.Gid, link: header.Linkname,
		major: header.Devmajor, minor: header.Devminor, content: sha256.Sum256(data),
	}
}

// create writes a layer beside its target and moves it there when complete.
func create(target string, fill func(*tar.Writer) error) (Layer, error) {
	file, err := os.CreateTemp(dirOf(target), ".layer-*")
	if err != nil {
		return Layer{}, fmt.Errorf("write layer: %w", err)
	}
	defer os.Remove(file.Name())
	defer file.Close()
	out := tar.NewWriter(file)
	if err := fill(out); err != nil {
		return Layer{}, fmt.Errorf("write layer %s: %w", target, err)
	}
	if err := errors.Join(out.Close(), file.Chmod(0o644), file.Close()); err != nil {
		return Layer{}, fmt.Errorf("write layer %s: %w", target, err)
	}
	if err := os.Rename(file.Name(), target); err != nil {
		return Layer{}, fmt.Errorf("write layer: %w", err)
	}
	return OpenLayer(target)
}
