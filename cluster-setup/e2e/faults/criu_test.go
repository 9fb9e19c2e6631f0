//go:build e2e

package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cluster"
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
	s.at = restores
	install, during := heldCRIU(target, s.breaks)
	// A restore that comes to its end later than anybody waits for it would show now.
	s.breaks, s.after = install, all(during, pause(outage))
	return s
}

// sessions is where the runtime keeps what belongs to a migration.
const sessions = "/run/containerd/io.containerd.grpc.v1.podmig-migration"

// killedCRIU lets CRIU work until its log has come to a line, and kills it there: the log
// is a pipe that holds no more than a page, so CRIU stands as soon as nobody reads.
func killedCRIU(part, log, line string) (install, during func(*fault) error) {
	var pipe *os.File
	install, begins := heldCRIU(part, func(f *fault) (err error) {
		pipe, err = f.tap(part, log)
		return err
	})
	return install, all(begins, func(f *fault) error {
		if err := pipe.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		var seen []byte
		buffer := make([]byte, 512)
		for !strings.Contains(string(seen), line) {
			n, err := pipe.Read(buffer)
			if err != nil {
				return fmt.Errorf("wait for %q in CRIU's log: %w; it ends with %s", line, err, tail(strings.Split(string(seen), "\n"), 10))
			}
			seen = append(seen, buffer[:n]...)
		}
		// Whoever reads the log of what failed must not wait at a pipe.
		if err := os.Remove(pipe.Name()); err != nil {
			return err
		}
		if err := os.WriteFile(pipe.Name(), seen, 0o600); err != nil {
			return err
		}
		// The first of its processes is CRIU itself; it makes others, among them those that
		// become the container's.
		return command(part, "sh", "-c", `kill -9 $(for p in /proc/[0-9]*; do
			[ "$(cat $p/comm 2>/dev/null)" != criu.real ] || echo ${p#/proc/}
		done | sort -n | head -n 1)`)(f)
	})
}

// tap puts a pipe in the place of a log file that does not exist yet.
func (f *fault) tap(part, log string) (*os.File, error) {
	m, err := f.machine(part)
	if err != nil {
		return nil, err
	}
	pattern, err := inside(m, filepath.Join(sessions, filepath.Dir(log)))
	if err != nil {
		return nil, err
	}
	found, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%d folders for the log of CRIU: %v", len(found), found)
	}
	path := filepath.Join(found[0], filepath.Base(log))
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("tap the log of CRIU: %w", err)
	}
	// Open for writing, too: otherwise it would be at its end before CRIU opens it.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("tap the log of CRIU: %w", err)
	}
	pipe := os.NewFile(uintptr(fd), path)
	f.later(func() { pipe.Close() })
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, 1)
	return pipe, err
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

func killedDuringDump(line string) scenario {
	install, during := killedCRIU(source, filepath.Join("c", "*", "mem", "dump0", "work", "dump.log"), line)
	return scenario{name: "CRIU killed in the dump at " + line, at: freezes, breaks: install, after: during, ends: source,
		reasons: []string{"FreezeFailed", "StreamFailed", "VerifyFailed"}}
}

func killedDuringRestore(line string) scenario {
	install, during := killedCRIU(target, "r/*/mem/work-counter0/restore.log", line)
	return scenario{name: "CRIU killed in the restore at " + line, at: restores, breaks: install, after: during, ends: source,
		reasons: []string{"RestoreFailed"}}
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
			reasons: []string{"FreezeFailed", "StreamFailed", "VerifyFailed", "RuntimeRestarted"}}),

		// CRIU has its code in the processes by now; it removes itself. Killed while it
		// makes a thread execute a single system call it would take the process with it.
		killedDuringDump("Dumping opened files"),
		killedDuringDump("Dumping pages"),
		// Processes exist, none of them runs yet.
		killedDuringRestore("Forking task"),
		killedDuringRestore("Restoring resources"),

		// A restore whose caller is gone is taken up again by the next one; with the
		// runtime that does it it ends. No process of it runs in between.
		duringRestore(scenario{name: "target kubelet killed during the restore", breaks: kill(target, cluster.Kubelet), ends: target}),
		duringRestore(scenario{name: "target containerd killed during the restore", breaks: kill(target, cluster.Containerd), ends: source,
			reasons: []string{"RestoreFailed"}}),
		duringRestore(scenario{name: "target kubelet killed during a long restore", breaks: all(kill(target, cluster.Kubelet), pause(3*outage)), ends: target}),
		duringRestore(scenario{name: "target containerd killed during a long restore", breaks: all(kill(target, cluster.Containerd), pause(3*outage)), ends: source,
			reasons: []string{"RestoreFailed"}}),
		duringRestore(scenario{name: "restore beyond its deadline", breaks: pause(deadlines.Restore + outage), ends: source,
			reasons: []string{"DeadlineExceeded"}}),
	})
}
