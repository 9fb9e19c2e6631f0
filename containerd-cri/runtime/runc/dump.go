package runc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
)

// dumpTimeout bounds what CRIU does, whatever the caller's deadline is: killed in
// the middle it would leave its code in the processes, so it is left to end, within
// reason.
const dumpTimeout = 2 * time.Minute

// pagePort is where CRIU's page server listens, in a network namespace of its own.
const pagePort = 1

const pidFile = "runc.pid"

// Dump implements runtime.Runtime. CRIU writes everything but the private memory
// (a lazy dump); that is read straight from the frozen processes afterwards. The
// page server that a lazy dump comes with is never used: anybody who can connect to
// it can read the memory, so it listens in a network namespace that only this
// process can enter, and it is ended as soon as it is there.
func (r *Runtime) Dump(ctx context.Context, c runtime.Container, m runtime.Memory, dir string, out *checkpoint.Writer, round uint32) (runtime.Dumped, error) {
	var res runtime.Dumped
	images, work := filepath.Join(dir, "images"), filepath.Join(dir, "work")
	for _, d := range []string{images, work} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return res, err
		}
	}
	conf := filepath.Join(dir, "criu.conf")
	if err := os.WriteFile(conf, []byte(dumpOptions), 0o600); err != nil {
		return res, err
	}
	start := time.Now()
	// What runc has a flag for it tells CRIU after CRIU has read dumpOptions: an absent
	// flag would undo the option of a container that has moved before.
	args := []string{"--root", c.OCIRoot, "checkpoint", "--leave-running", "--tcp-skip-in-flight", "--file-locks", "--image-path", images, "--work-path", work}
	var said []byte
	var err error
	dump := plainDump
	if _, lazy := userfaultFeatures(); lazy {
		dump = lazyDump
		args = append(args, "--lazy-pages", "--page-server", "127.0.0.1:"+strconv.Itoa(pagePort), "--status-fd", "3")
	}
	err = onOwnThread(func() error {
		said, err = dump(exec.Command(c.OCIBinary, append(args, c.ID)...), conf, dir)
		return err
	})
	res.Duration = time.Since(start)
	if err != nil {
		err = dumpError(c, err, said, filepath.Join(work, "dump.log"))
	}
	// CRIU thaws the group while it works. What it leaves is checked, and frozen
	// again before anybody hears of an error.
	if frozen, ferr := r.Frozen(ctx, c); ferr != nil || !frozen {
		fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		ferr = errors.Join(ferr, r.Freeze(fctx, []runtime.Container{c}))
		err = errors.Join(err, fmt.Errorf("container %s has run during its dump", c.Name), ferr)
	}
	if err = errors.Join(err, ctx.Err()); err != nil {
		return res, err
	}
	t, ok := m.(*tracker)
	if !ok {
		return res, fmt.Errorf("memory of container %s is not from this runtime", c.Name)
	}
	s := &sender{ctx: ctx, images: images, out: out, round: round, res: &res, tracker: t}
	return res, s.send()
}

// start runs a command and notes its process for Recover.
func start(cmd *exec.Cmd, conf, dir string, said *bytes.Buffer) (stop func() bool, err error) {
	cmd.Env = append(os.Environ(), "CRIU_CONFIG_FILE="+conf)
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, pidFile), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		return nil, err
	}
	return time.AfterFunc(dumpTimeout, func() { _ = cmd.Process.Kill() }).Stop, nil
}

func plainDump(cmd *exec.Cmd, conf, dir string) ([]byte, error) {
	var said bytes.Buffer
	stop, err := start(cmd, conf, dir, &said)
	if err != nil {
		return nil, err
	}
	defer stop()
	err = cmd.Wait()
	return said.Bytes(), err
}

func lazyDump(cmd *exec.Cmd, conf, dir string) ([]byte, error) {
	ready, status, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	defer status.Close()
	cmd.ExtraFiles = []*os.File{status}
	var said bytes.Buffer
	stop, err := start(cmd, conf, dir, &said)
	if err != nil {
		return nil, err
	}
	defer stop()
	status.Close()
	// runc writes one byte when the dump is complete; the end of the pipe without it
	// means that there is none.
	var b [1]byte
	if _, err := io.ReadFull(ready, b[:]); err == nil {
		if err := awaitPageServer(10 * time.Second); err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			return said.Bytes(), err
		}
	}
	err = cmd.Wait()
	return said.Bytes(), err
}

// endPageServer ends the session of CRIU's page server in the order that CRIU
// takes for success: a connection that is closed. The caller's thread is in the
// server's network namespace.
func endPageServer() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("page server: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: pagePort, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return fmt.Errorf("page server: %w", err)
	}
	return nil
}

// awaitPageServer ends the session as soon as there is one: runc reports the end of
// the dump just before CRIU listens.
func awaitPageServer(limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(200 * time.Microsecond) {
		err := endPageServer()
		if err == nil || !errors.Is(err, unix.ECONNREFUSED) || time.Now().After(deadline) {
			return err
		}
	}
}

// onOwnThread calls f on a thread that is prepared for CRIU: with a network
// namespace of its own, which ends with the thread and with the processes f has
// started, and where needed with an answer to questions about limits.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine and is not reused.
		goruntime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("network namespace: %w", err)
			}
			if err := loopbackUp(); err != nil {
				return err
			}
			if !mayReadLimits() {
				if err := answerLimits(); err != nil {
					return err
				}
			}
			return f()
		}()
	}()
	return <-done
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("loopback device: %w", err)
	}
	return nil
}

// Recover implements runtime.Runtime. A dump outlives this process: CRIU finishes
// it, and then waits at its page server for somebody to end it.
func (r *Runtime) Recover(ctx context.Context, c runtime.Container, dir string) error {
	if err := recoverDump(ctx, c, filepath.Join(dir, pidFile)); err != nil {
		return fmt.Errorf("interrupted dump of container %s: %w", c.ID, err)
	}
	return r.Freeze(ctx, []runtime.Container{c})
}

func recoverDump(ctx context.Context, c runtime.Container, file string) error {
	pid, err := dumpPid(c, file)
	if err != nil || pid == 0 {
		return err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	// The number may belong to another process by now.
	if !dumps(pid, c) {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread()
		done <- func() error {
			if err := unix.Setns(pidfd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter its network namespace: %w", err)
			}
			// Refused means not yet, or not any more.
			for ctx.Err() == nil {
				_ = endPageServer()
				if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 5); n == 1 {
					return nil
				}
			}
			return fmt.Errorf("it does not end: %w", ctx.Err())
		}()
	}()
	return <-done
}

// dumpPid returns the process of a dump, 0 when there is none. When this process ended
// after it had started the dump and before it could note its number, all processes are
// looked through: a dump that nobody knows of would freeze the container later.
func dumpPid(c runtime.Container, file string) (int, error) {
	b, err := os.ReadFile(file)
	if pid, perr := strconv.Atoi(string(b)); err == nil && perr == nil {
		return pid, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	pids, err := ociProcesses("checkpoint", c.ID)
	if len(pids) == 0 || err != nil {
		return 0, err
	}
	return pids[0], nil
}

// ociProcesses finds the processes of OCI runtimes that carry out a command on a
// container.
func ociProcesses(command, id string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && carriesOut(pid, command, id) {
			out = append(out, pid)
		}
	}
	return out, nil
}

func carriesOut(pid int, command, id string) bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && bytes.Contains(cmdline, []byte("\x00"+command+"\x00")) && bytes.HasSuffix(cmdline, []byte("\x00"+id+"\x00"))
}

// dumps tells whether a process is the OCI runtime that dumps a container.
func dumps(pid int, c runtime.Container) bool { return carriesOut(pid, "checkpoint", c.ID) }
