//go:build e2e

package faults

import (
	"errors"
	"fmt"
	"testing"

	"podmig.dev/podmig/cluster-setup/supervisor"
)

// command runs a command in a node.
func command(node string, args ...string) func(*fault) error {
	return func(f *fault) error {
		return f.k.Cluster.Run(f.ctx, f.lane[node], supervisor.Command{Args: args, Stderr: f.Output()})
	}
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
	// Whatever directory the runtime writes to is replaced by one that is full.
	full := func(pattern string) func(*fault) error {
		return func(f *fault) error {
			f.later(func() {
				if err := command(target, "sh", "-ec", "umount /run/full; rmdir /run/full")(f); err != nil {
					f.Error(err)
				}
			})
			return command(target, "sh", "-ec", `mkdir /run/full; mount -t tmpfs -o size=64k tmpfs /run/full
				! dd if=/dev/zero of=/run/full/full bs=4k status=none 2>/dev/null
				set -- `+pattern+`; [ $# = 1 ]; mount --bind /run/full $1`)(f)
		}
	}
	emptyDir := full("/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/data")
	// Nothing more fits than what came in the rounds.
	shrink := command(target, "sh", "-ec", `for d in /run/containerd/io.containerd.grpc.v1.podmig-migration/r/*/mem; do
		mount -o remount,size=$(df --output=used -k $d | tail -n 1 | tr -d ' ')k $d; done`)
	runAll(t, []scenario{
		{name: "memory of the target", at: beforeFreeze, breaks: shrink, ends: source, reasons: []string{"VerifyFailed", "StreamFailed", "FreezeFailed"}},
		{name: "volume of the target", at: beforeFreeze, breaks: emptyDir, ends: source, reasons: []string{"VerifyFailed", "StreamFailed", "FreezeFailed"}},
		{name: "disk of the target before the freeze", before: small(target), at: "target.journal-arming-durable", breaks: fill(target),
			ends: source, reasons: []string{"JournalFailed"}},
		{name: "disk of the target while frozen", before: small(target), at: frozenTarget, breaks: fill(target), ends: source, reasons: []string{"JournalFailed"}},
		{name: "disk of the source at the commit", before: small(source), at: givesAway, breaks: fill(source), ends: source, reasons: []string{"SourceRefused"}},
	})
}
