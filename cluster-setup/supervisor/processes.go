package supervisor

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// processes starts children and reaps every process that ends here, also those orphaned below: the first process of a PID
// namespace inherits them. Starting and reaping exclude each other, so that an end is never seen before the start is recorded.
type processes struct {
	mu      sync.Mutex
	waiters map[int]chan<- unix.WaitStatus
}

type command struct {
	args  []string
	env   []string
	dir   string
	files []uintptr
}

// start runs a command in a session of its own. The channel receives its status once.
func (p *processes) start(c command) (int, <-chan unix.WaitStatus, error) {
	path, err := exec.LookPath(c.args[0])
	if err != nil {
		return 0, nil, fmt.Errorf("find program: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	pid, err := syscall.ForkExec(path, c.args, &syscall.ProcAttr{
		Dir: c.dir,
		// Of a variable that is set twice the last counts; many programs take the first.
		Env:   (&exec.Cmd{Env: c.env}).Environ(),
		Files: c.files,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", path, err)
	}
	ended := make(chan unix.WaitStatus, 1)
	p.waiters[pid] = ended
	return pid, ended, nil
}

// reap collects processes each time the kernel says that a child has ended.
func (p *processes) reap(signals <-chan os.Signal) {
	for range signals {
		for p.reapOne() {
		}
	}
}

func (p *processes) reapOne() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	var status unix.WaitStatus
	pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
	if err == unix.EINTR {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	if waiter, ok := p.waiters[pid]; ok {
		delete(p.waiters, pid)
		waiter <- status
	}
	return true
}

// signal reaches the whole session of a command that this supervisor started, and only while it runs.
func (p *processes) signal(pid int, signal unix.Signal, group bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.waiters[pid]; !ok {
		return nil
	}
	if group {
		pid = -pid
	}
	return unix.Kill(pid, signal)
}

func describe(status unix.WaitStatus) string {
	switch {
	case status.Exited():
		return fmt.Sprintf("exit status %d", status.ExitStatus())
	case status.Signaled():
		return "signal " + unix.SignalName(status.Signal())
	default:
		return fmt.Sprintf("wait status %d", status)
	}
}

// exitCode follows the shell: 128 and the signal's number for a process that a signal ended.
func exitCode(status unix.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}
