package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// barrierTimeout bounds how long a restored container waits for the others and for
// somebody who wants it.
const barrierTimeout = 2 * time.Minute

// barrier keeps the processes of a pod's containers from running until all containers
// are restored and for each of them a caller waits. Without it the first one would go
// on while CRIU still compares the files of the second with what they were at the
// freeze, a container that cannot be restored would be noticed when others have run
// already, and a restore whose caller has died would bring up processes of which nobody
// knows. Such a restore waits here for the caller's successor.
//
// CRIU calls a script when everything is restored and nothing runs yet. The script
// waits at a pipe of this process; if this process ends, so does the restore. A call of
// the script before that tells which process CRIU is.
type barrier struct {
	mu      sync.Mutex
	missing map[string]bool // by container ID
	callers map[string]int  // by container ID
	// lost: CRIU of one of them has ended too early.
	lost bool
	err  error
	// passed is closed when the last container is there, or when err is set.
	passed chan struct{}
}

func newBarrier(cs []Container) *barrier {
	b := &barrier{missing: map[string]bool{}, callers: map[string]int{}, passed: make(chan struct{})}
	for _, c := range cs {
		b.missing[c.ID], b.callers[c.ID] = true, 0
	}
	return b
}

// arrive notes that a container is restored.
func (b *barrier) arrive(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.missing, id)
	b.look()
}

// join notes that a caller waits for a container, leave that it does not any more.
func (b *barrier) join(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.callers[id]++
	b.look()
}

func (b *barrier) leave(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.callers[id]--
}

func (b *barrier) look() {
	if len(b.missing) > 0 || b.lost {
		return
	}
	for _, n := range b.callers {
		if n == 0 {
			return
		}
	}
	b.end(nil)
}

// lose lets none of the containers run, and leaves it to the one that is lost to say why.
func (b *barrier) lose() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = true
}

// abort lets none of the containers run. After they were let go it has no effect.
func (b *barrier) abort(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.end(err)
}

func (b *barrier) end(err error) {
	select {
	case <-b.passed:
	default:
		b.err = err
		close(b.passed)
	}
}

// verdict is why nothing may run, once that is known.
func (b *barrier) verdict() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// gate is where one container waits.
type gate struct {
	b *barrier
	// abandon is called when CRIU has ended before the container was let go, and what it
	// has made holds up whoever waits for it.
	abandon func()
	// passed is set just before the container is let go.
	passed atomic.Bool
	// over ends with the restore.
	over context.Context
	end  context.CancelFunc
	// script is what CRIU has to call.
	script *os.File
	// readyOut and goIn are opened by the script, by their names in /proc.
	readyIn, readyOut, goIn, goOut *os.File
	watch                          sync.WaitGroup
}

// abandonAfter is how long a restore without CRIU may take to fail by itself.
const abandonAfter = time.Second

// gate returns the gate of one container. restored is called when it is restored.
func (b *barrier) gate(id string, restored, abandon func()) (_ *gate, err error) {
	g := &gate{b: b, abandon: abandon}
	g.over, g.end = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if g.readyIn, g.readyOut, err = os.Pipe(); err != nil {
		return nil, err
	}
	if g.goIn, g.goOut, err = os.Pipe(); err != nil {
		return nil, err
	}
	// A file in memory: the directories of sessions may be mounted noexec.
	fd, err := unix.MemfdCreate("podmig-barrier", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("podmig-barrier", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("script of the restore: %w", err)
	}
	path := own(fd)
	// It must not be open for writing when it is called.
	w := os.NewFile(uintptr(fd), "script")
	defer w.Close()
	text := fmt.Sprintf(script, own(int(g.readyOut.Fd())), own(int(g.goIn.Fd())))
	if _, err := w.WriteString(text); err != nil {
		return nil, fmt.Errorf("script of the restore: %w", err)
	}
	if g.script, err = os.Open(path); err != nil {
		return nil, fmt.Errorf("script of the restore: %w", err)
	}
	g.watch.Go(func() {
		defer g.goOut.Close()
		if !g.ready() {
			return // Closed: the restore has ended.
		}
		restored()
		b.arrive(id)
		select {
		case <-b.passed:
		case <-time.After(barrierTimeout):
			b.abort(errors.New("not everything was restored and wanted within " + barrierTimeout.String()))
		}
		if b.verdict() == nil {
			g.passed.Store(true)
			// The script is gone if the container has failed meanwhile.
			_, _ = g.goOut.WriteString("go\n")
		}
	})
	return g, nil
}

// script is what CRIU calls, with the action in the environment.
const script = `#!/bin/sh
case $CRTOOLS_SCRIPT_ACTION in
pre-restore) echo $PPID >%[1]s ;;
post-restore) echo ready >%[1]s && read -r answer <%[2]s && [ "$answer" = go ] ;;
esac
`

// ready waits until everything is restored.
func (g *gate) ready() bool {
	for lines := bufio.NewScanner(g.readyIn); lines.Scan(); {
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			return true
		}
		g.watch.Go(func() { g.guard(pid) })
	}
	return false
}

// guard waits for the end of CRIU. One that was killed leaves processes that wait for it
// for ever, and hold the socket on which the OCI runtime listens for its answer.
func (g *gate) guard(criu int) {
	if !exited(g.over, criu) {
		return
	}
	g.b.lose()
	select {
	case <-g.over.Done():
		return
	case <-time.After(abandonAfter):
	}
	if !g.passed.Load() {
		g.abandon()
	}
}

// exited waits for the end of a process and tells whether it came before ctx's.
func exited(ctx context.Context, pid int) (gone bool) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Now()) })()
	c, err := f.SyscallConn()
	if err != nil {
		return false
	}
	_ = c.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		gone = n > 0 && err == nil
		return gone
	})
	return gone
}

// own is the name under which others find a file that this process has open.
func own(fd int) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) }

// options are what CRIU has to be told.
func (g *gate) options() string { return "action-script " + own(int(g.script.Fd())) + "\n" }

// finish ends the gate when CRIU has ended, with what came out, and says why the
// container does not run if that was not its own fault.
func (g *gate) finish(c *Container, err error) error {
	others := g.b.verdict()
	if err != nil {
		g.b.abort(fmt.Errorf("container %s: %w", c.Name, err))
	} else {
		// Of a restore that needed no CRIU nobody has heard yet.
		g.b.arrive(c.ID)
	}
	g.close()
	if err != nil && others != nil {
		return fmt.Errorf("nothing was resumed: %w", others)
	}
	return err
}

func (g *gate) close() {
	g.end()
	for _, f := range []*os.File{g.readyIn, g.readyOut, g.goIn, g.script} {
		if f != nil {
			_ = f.Close()
		}
	}
	if g.goOut != nil && g.script == nil {
		_ = g.goOut.Close()
	}
	g.watch.Wait()
}
