//go:build e2e

package faults

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/provider/netns"
)

// faultDir is where the kubelet of the tests looks for points at which to stop.
const faultDir = "/run/podmig-faults"

// inside is a machine's path as the host sees it.
func inside(m netns.Machine, path string) (string, error) {
	pid, err := m.InitPID()
	if err != nil {
		return "", err
	}
	return filepath.Join(fmt.Sprintf("/proc/%d/root", pid), path), nil
}

// point is a place at which something in a node stops until it is let go.
type point struct {
	path string
	held *os.File
}

// setPoint asks a node to stop at a name: whoever opens the FIFO for reading waits.
func (f *fault) setPoint(node, name string) (*point, error) {
	m, err := f.machine(node)
	if err != nil {
		return nil, err
	}
	path, err := inside(m, filepath.Join(faultDir, name))
	if err != nil {
		return nil, err
	}
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("set the point %s: %w", name, err)
	}
	return &point{path: path}, nil
}

// reached waits until somebody has stopped at the point. The next who comes by does
// not stop any more.
func (p *point) reached(ctx context.Context) error {
	type opened struct {
		f   *os.File
		err error
	}
	ch := make(chan opened, 1)
	go func() {
		f, err := os.OpenFile(p.path, os.O_WRONLY, 0)
		ch <- opened{f, err}
	}()
	select {
	case o := <-ch:
		if o.err != nil {
			return fmt.Errorf("wait at %s: %w", filepath.Base(p.path), o.err)
		}
		p.held = o.f
		return os.Remove(p.path)
	case <-ctx.Done():
		// A reader ends the other opening.
		if r, err := os.OpenFile(p.path, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			if o := <-ch; o.err == nil {
				o.f.Close()
			}
			r.Close()
		}
		return fmt.Errorf("nobody came to %s: %w", filepath.Base(p.path), ctx.Err())
	}
}

// release lets go whoever stands at the point.
func (p *point) release() {
	if p.held != nil {
		p.held.Close()
		p.held = nil
	}
	if err := os.Remove(p.path); err != nil && !os.IsNotExist(err) {
		panic(err) // A FIFO that stays would stop every later test.
	}
}

// side is whose point one is, by its name.
func side(point string) string {
	if strings.HasPrefix(point, "source.") {
		return source
	}
	return target
}

// clearPoints removes what a test that failed has left.
func (f *fault) clearPoints(node string) error {
	m, err := f.machine(node)
	if err != nil {
		return err
	}
	dir, err := inside(m, faultDir)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type()&fs.ModeNamedPipe == 0 {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
