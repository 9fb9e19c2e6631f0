package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// ErrFormat is wrapped by every error about bytes that are not a valid stream.
var ErrFormat = errors.New("invalid checkpoint stream")

// ErrVersion is wrapped by errors about streams of a version that is not known.
var ErrVersion = errors.New("unknown checkpoint stream version")

// ErrDigest is wrapped by errors about parts that are not what the manifest says.
var ErrDigest = errors.New("checkpoint stream does not verify")

// Manifest says what a checkpoint consists of. It is the last frame of a stream.
type Manifest struct {
	Version uint32 `json:"version"`
	Session string `json:"session"`
	// FrozenAt is CLOCK_REALTIME of the source, nanoseconds since 1970.
	FrozenAt   int64       `json:"frozenAt"`
	Source     Node        `json:"source"`
	Containers []Container `json:"containers"`
	Volumes    []string    `json:"volumes,omitempty"`
	Rounds     []Round     `json:"rounds,omitempty"`
	Parts      []Digest    `json:"parts"`
}

// Node is the machine and the software that made the checkpoint.
type Node struct {
	Runtime      string   `json:"runtime"`
	OCIRuntime   string   `json:"ociRuntime"`
	CRIU         string   `json:"criu"`
	Kernel       string   `json:"kernel"`
	Architecture string   `json:"architecture"`
	CPUFeatures  []string `json:"cpuFeatures,omitempty"`
}

// Container is one container of the checkpoint.
type Container struct {
	Name string `json:"name"`
	// ImageID is the digest of the image configuration, which names the layers
	// below the writable one.
	ImageID string `json:"imageID"`
	// StartedAt is the start of the container, nanoseconds since 1970.
	StartedAt int64 `json:"startedAt"`
	// Args, Env and the rest of the process are in memory; Args only helps
	// people to recognise it.
	Args []string `json:"args,omitempty"`
	// MemoryBytes is the memory that was resident when the container was frozen.
	MemoryBytes uint64 `json:"memoryBytes"`
	// Process is what a directory says of the first process, for the comparison with
	// the container that it is restored into. A migration has none: the environment of
	// its target differs.
	Process *Process `json:"process,omitempty"`
}

// Process describes how the first process of a container was started.
type Process struct {
	Env    []string `json:"env,omitempty"`
	Cwd    string   `json:"cwd"`
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
}

// Digest pins the bytes of one part.
type Digest struct {
	Part
	// Bytes counts the data of the part, without the framing.
	Bytes  uint64 `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// Container returns the container of the name, nil when there is none.
func (m *Manifest) Container(name string) *Container {
	for i := range m.Containers {
		if m.Containers[i].Name == name {
			return &m.Containers[i]
		}
	}
	return nil
}

// MaxManifest is the most bytes of a manifest.
const MaxManifest = maxManifest

// ParseManifest reads a manifest that is kept beside its stream.
func ParseManifest(b []byte, session string) (*Manifest, error) {
	m := new(Manifest)
	if err := decodeStrict(b, m); err != nil {
		return nil, err
	}
	return m, m.check(session)
}

func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%w: %v", ErrFormat, err)
	}
	if d.More() {
		return fmt.Errorf("%w: data after a JSON value", ErrFormat)
	}
	return nil
}

// decodeCanonical accepts only what the Writer writes, to the byte: what is decoded
// here is compared by value later, and JSON has several spellings of a value.
func decodeCanonical(b []byte, v any) error {
	if err := decodeStrict(b, v); err != nil {
		return err
	}
	again, err := json.Marshal(v)
	if err != nil || !bytes.Equal(again, b) {
		return fmt.Errorf("%w: %.100q is no canonical JSON", ErrFormat, b)
	}
	return nil
}

func (m *Manifest) check(session string) error {
	if m.Version != Version {
		return fmt.Errorf("%w: manifest says %d, this side speaks %d", ErrVersion, m.Version, Version)
	}
	if m.Session != session {
		return fmt.Errorf("%w: manifest of session %q in a stream of session %q", ErrFormat, m.Session, session)
	}
	if len(m.Containers) == 0 {
		return fmt.Errorf("%w: manifest names no containers", ErrFormat)
	}
	seen := map[string]bool{}
	for _, c := range m.Containers {
		if !validName(c.Name) || seen[c.Name] {
			return fmt.Errorf("%w: container name %q is invalid or given twice", ErrFormat, c.Name)
		}
		seen[c.Name] = true
	}
	volumes := map[string]bool{}
	for _, v := range m.Volumes {
		if !validName(v) || volumes[v] {
			return fmt.Errorf("%w: volume name %q is invalid or given twice", ErrFormat, v)
		}
		volumes[v] = true
	}
	for i := range m.Rounds {
		if m.Rounds[i].Number != uint32(i) || m.Rounds[i].Final != (i == len(m.Rounds)-1) {
			return fmt.Errorf("%w: rounds are not numbered from 0 with the final one last", ErrFormat)
		}
	}
	return nil
}
