//go:build e2e

package faults

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// criu is where a node has CRIU.
const criu = "/usr/sbin/criu"

// replaceCRIU puts a script in the place of CRIU, which it finds under the name
// criu.real.
func replaceCRIU(node, script string) func(*fault) error {
	return func(f *fault) error {
		m, err := f.machine(node)
		if err != nil {
			return err
		}
		path, err := inside(m, criu)
		if err != nil {
			return err
		}
		if err := os.Rename(path, path+".real"); err != nil {
			return err
		}
		f.later(func() {
			if err := os.Rename(path+".real", path); err != nil {
				f.Error(err)
			}
		})
		return os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755)
	}
}

// failCRIU lets every CRIU on a node fail at once.
func failCRIU(node string) func(*fault) error {
	return replaceCRIU(node, "echo 'nothing works today' >&2; exit 1")
}

// heldCRIU lets the next CRIU on a node stop before it does anything, and does
// something while it stands.
func heldCRIU(node string, breaks func(*fault) error) (install, during func(*fault) error) {
	const name = "criu"
	var p *point
	install = func(f *fault) (err error) {
		if p, err = f.setPoint(node, name); err != nil {
			return err
		}
		f.later(p.release)
		return replaceCRIU(node, fmt.Sprintf(`p=%s/%s; [ ! -p $p ] || cat $p; exec %s.real "$@"`, faultDir, name, criu))(f)
	}
	during = func(f *fault) error {
		if err := p.reached(f.ctx); err != nil {
			return err
		}
		if err := breaks(f); err != nil {
			return err
		}
		p.release()
		return nil
	}
	return install, during
}

// duringDump and duringRestore make scenarios in which something breaks while CRIU works.
func duringDump(s scenario) scenario {
	s.at = freezes
	s.breaks, s.after = heldCRIU(source, s.breaks)
	return s
}

func duringRestore(s scenario) scenario {
	s.at, s.undone = restores, true
	install, during := heldCRIU(target, s.breaks)
	// A restore that comes to its end later than anybody waits for it would show now.
	s.breaks, s.after = install, all(during, pause(outage))
	return s
}

// loseBinary removes the program of the clone's container, which CRIU has to map.
func loseBinary(f *fault) error {
	m, err := f.machine(target)
	if err != nil {
		return err
	}
	pattern, err := inside(m, "/run/containerd/io.containerd.runtime.v2.task/k8s.io/*/rootfs/counter")
	if err != nil {
		return err
	}
	found, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("the clone's program is in %d places", len(found))
	}
	return os.Remove(found[0])
}

// command runs a command in a node.
func command(node string, args ...string) func(*fault) error {
	return func(f *fault) error {
		return f.k.Cluster.Run(f.ctx, f.lane[node], supervisor.Command{Args: args, Stderr: f.Output()})
	}
}

// CRIU that fails, and CRIU that takes long while daemons end around it.
func TestFaultCRIU(t *testing.T) {
	runAll(t, []scenario{
		{name: "dump fails", at: freezes, breaks: failCRIU(source), ends: source, reasons: []string{"FreezeFailed", "StreamFailed", "VerifyFailed"}},
		{name: "no restore at all", at: restores, breaks: failCRIU(target), ends: source, reasons: []string{"RestoreFailed"}},
		duringRestore(scenario{name: "restore fails in the middle", breaks: loseBinary, ends: source, reasons: []string{"RestoreFailed"}}),

		duringDump(scenario{name: "source kubelet killed during the dump", breaks: kill(source, cluster.Kubelet), ends: source,
			reasons: []string{"FreezeFailed", "StreamFailed", "VerifyFailed"}}),
		duringDump(scenario{name: "source containerd killed during the dump", breaks: kill(source, cluster.Containerd), ends: source,
			reasons: []string{"FreezeFailed", "StreamFailed", "VerifyFailed"}}),
		duringDump(scenario{name: "target kubelet killed during the dump", breaks: kill(target, cluster.Kubelet), ends: source,
			reasons: []string{"KubeletRestarted"}}),
		duringDump(scenario{name: "target containerd killed during the dump", breaks: kill(target, cluster.Containerd), ends: source,
			reasons: []string{"FreezeFailed", "StreamFailed", "VerifyFailed"}}),

		// A restore that goes on after its caller is gone must not become a second copy.
		duringRestore(scenario{name: "target kubelet killed during the restore", breaks: kill(target, cluster.Kubelet), ends: either,
			reasons: []string{"RestoreFailed"}}),
		duringRestore(scenario{name: "target containerd killed during the restore", breaks: kill(target, cluster.Containerd), ends: either,
			reasons: []string{"RestoreFailed"}}),
		duringRestore(scenario{name: "target kubelet killed during a long restore", breaks: all(kill(target, cluster.Kubelet), pause(3*outage)), ends: either,
			reasons: []string{"RestoreFailed"}}),
		duringRestore(scenario{name: "target containerd killed during a long restore", breaks: all(kill(target, cluster.Containerd), pause(3*outage)), ends: either,
			reasons: []string{"RestoreFailed"}}),
		duringRestore(scenario{name: "restore beyond its deadline", breaks: pause(deadlines.Restore + outage), ends: source,
			reasons: []string{"DeadlineExceeded"}}),
	})
}

// Places on the nodes that are full.
func TestFaultFull(t *testing.T) {
	const journal = "/var/lib/kubelet/migrations"
	small := func(node string) func(*fault) error {
		return func(f *fault) error {
			f.later(func() {
				if err := command(node, "umount", journal)(f); err != nil {
					f.Error(err)
				}
			})
			return command(node, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", journal)(f)
		}
	}
	fill := func(node string) func(*fault) error {
		return func(f *fault) error {
			err := command(node, "dd", "if=/dev/zero", "of="+journal+"/.full", "bs=4k", "status=none")(f)
			if e := (*supervisor.ExitError)(nil); !errors.As(err, &e) {
				return fmt.Errorf("the disk does not get full: %w", err)
			}
			return nil
		}
	}
	shrink := command(target, "sh", "-ec", `for d in /run/containerd/io.containerd.grpc.v1.podmig-migration/r/*/mem; do mount -o remount,size=128k $d; done`)
	runAll(t, []scenario{
		{name: "memory of the target", at: beforeFreeze, breaks: shrink, ends: source, reasons: []string{"VerifyFailed", "StreamFailed", "FreezeFailed"}},
		{name: "disk of the target before the freeze", before: small(target), at: "target.journal-arming-durable", breaks: fill(target),
			ends: source, reasons: []string{"JournalFailed"}},
		{name: "disk of the target while frozen", before: small(target), at: frozenTarget, breaks: fill(target), ends: source, reasons: []string{"JournalFailed"}},
		{name: "disk of the source at the commit", before: small(source), at: givesAway, breaks: fill(source), ends: source, reasons: []string{"SourceRefused"}},
	})
}
