// Package fake simulates the runtime port: containers that count instead of
// running. It obeys the port's contract, so the service can be tested without root,
// and it can be told to fail. It proves nothing about processes.
package fake

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
)

// Runtime implements runtime.Runtime. The zero value is ready to use.
type Runtime struct {
	// Writes is how many pages each round finds written, beside the one that it sends.
	Writes uint64
	// Fail, when set, is asked with the method's name before the work.
	Fail func(ctx context.Context, method string) error
	// Memory is how many bytes of memory every container has.
	Memory int
	// Exited is told when a container was killed.
	Exited func(id string)

	mu         sync.Mutex
	containers map[string]*container
}

type container struct {
	frozen bool
	count  int64
	since  time.Time
}

// state is the only image of a fake container.
type state struct{ Count int64 }

// Image is the name of that image. CRIU has one of the same name.
const Image = "inventory.img"

// Run makes a container that counts milliseconds from a number on.
func (r *Runtime) Run(id string, count int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.containers == nil {
		r.containers = map[string]*container{}
	}
	r.containers[id] = &container{count: count, since: time.Now()}
}

// Restore makes a container from the images of a dump.
func (r *Runtime) Restore(id, images string) error {
	b, err := os.ReadFile(filepath.Join(images, Image))
	if err != nil {
		return err
	}
	var st state
	if err := json.Unmarshal(b, &st); err != nil {
		return err
	}
	r.Run(id, st.Count)
	return nil
}

// Count returns how far a running container has counted.
func (r *Runtime) Count(id string) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil || c.frozen {
		return 0, fmt.Errorf("container %s does not answer", id)
	}
	return int(c.now()), nil
}

func (c *container) now() int64 {
	if c.frozen {
		return c.count
	}
	return c.count + time.Since(c.since).Milliseconds()
}

func (r *Runtime) fail(ctx context.Context, method string) error {
	if r.Fail != nil {
		return r.Fail(ctx, method)
	}
	return nil
}

func (r *Runtime) each(cs []runtime.Container, f func(*container)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range cs {
		c := r.containers[x.ID]
		if c == nil {
			return fmt.Errorf("container %s: %w", x.ID, runtime.ErrGone)
		}
		f(c)
	}
	return nil
}

// Features implements runtime.Runtime.
func (r *Runtime) Features(ctx context.Context) (runtime.Features, error) {
	return runtime.Features{
		OCIName: "fake", OCIVersion: "1", CRIUVersion: "0", KernelRelease: "0", Architecture: "amd64",
		CPUFeatures: []string{"fpu"}, LazyPages: true, CgroupMode: "v2",
	}, r.fail(ctx, "Features")
}

// Preflight implements runtime.Runtime.
func (r *Runtime) Preflight(ctx context.Context, cs []runtime.Container) (runtime.Report, error) {
	return runtime.Report{MemoryBytes: uint64(len(cs)) * uint64(max(r.Memory, 1))}, r.fail(ctx, "Preflight")
}

// Freeze implements runtime.Runtime.
func (r *Runtime) Freeze(ctx context.Context, cs []runtime.Container) error {
	if err := r.fail(ctx, "Freeze"); err != nil {
		return err
	}
	return r.each(cs, func(c *container) { c.count, c.frozen = c.now(), true })
}

// Frozen implements runtime.Runtime.
func (r *Runtime) Frozen(_ context.Context, x runtime.Container) (frozen bool, err error) {
	err = r.each([]runtime.Container{x}, func(c *container) { frozen = c.frozen })
	return frozen, err
}

// Thaw implements runtime.Runtime.
func (r *Runtime) Thaw(ctx context.Context, cs []runtime.Container) error {
	if err := r.fail(ctx, "Thaw"); err != nil {
		return err
	}
	for _, x := range cs {
		// A container that does not exist is as thawed as it can be.
		_ = r.each([]runtime.Container{x}, func(c *container) {
			if c.frozen {
				c.frozen, c.since = false, time.Now()
			}
		})
	}
	return nil
}

// Kill implements runtime.Runtime.
func (r *Runtime) Kill(ctx context.Context, cs []runtime.Container) error {
	if err := r.fail(ctx, "Kill"); err != nil {
		return err
	}
	for _, x := range cs {
		r.mu.Lock()
		_, ok := r.containers[x.ID]
		delete(r.containers, x.ID)
		r.mu.Unlock()
		if ok && r.Exited != nil {
			r.Exited(x.ID)
		}
	}
	return nil
}

// memory of a container is one process whose first page holds what it has counted.
type memory struct {
	r    *Runtime
	x    runtime.Container
	part *checkpoint.PartWriter
}

// Track implements runtime.Runtime.
func (r *Runtime) Track(x runtime.Container) runtime.Memory { return &memory{r: r, x: x} }

// Round implements runtime.Memory.
func (m *memory) Round(ctx context.Context, out *checkpoint.Writer, round uint32) (uint64, error) {
	if err := m.r.fail(ctx, "Round"); err != nil {
		return 0, err
	}
	return 1 + m.r.Writes, m.send(out, round)
}

// Close implements runtime.Memory.
func (m *memory) Close() {}

func (m *memory) send(out *checkpoint.Writer, round uint32) (err error) {
	if m.part == nil {
		if m.part, err = out.Begin(checkpoint.Part{Kind: checkpoint.KindPages, Container: m.x.Name, Name: "1"}); err != nil {
			return err
		}
	}
	var count int64
	if err := m.r.each([]runtime.Container{m.x}, func(c *container) { count = c.now() }); err != nil {
		return err
	}
	page := make([]byte, checkpoint.PageSize)
	binary.LittleEndian.PutUint64(page, uint64(count))
	return m.part.Pages(round, 0x1000, page)
}

// Dump implements runtime.Runtime.
func (r *Runtime) Dump(ctx context.Context, x runtime.Container, m runtime.Memory, dir string, out *checkpoint.Writer, round uint32) (runtime.Dumped, error) {
	if err := r.fail(ctx, "Dump"); err != nil {
		return runtime.Dumped{}, err
	}
	var st state
	if err := r.each([]runtime.Container{x}, func(c *container) { st.Count = c.count }); err != nil {
		return runtime.Dumped{}, err
	}
	sent := m.(*memory)
	if err := sent.send(out, round); err != nil {
		return runtime.Dumped{}, err
	}
	if err := sent.part.Close(); err != nil {
		return runtime.Dumped{}, err
	}
	b, err := json.Marshal(st)
	if err != nil {
		return runtime.Dumped{}, err
	}
	w, err := out.Begin(checkpoint.Part{Kind: checkpoint.KindImage, Container: x.Name, Name: Image})
	if err != nil {
		return runtime.Dumped{}, err
	}
	if err := w.Data(0, b); err != nil {
		return runtime.Dumped{}, err
	}
	return runtime.Dumped{Duration: 1, MemoryBytes: uint64(r.Memory)}, w.Close()
}

// Recover implements runtime.Runtime.
func (r *Runtime) Recover(ctx context.Context, c runtime.Container, _ string) error {
	return r.Freeze(ctx, []runtime.Container{c})
}
