package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// Listen opens the control socket. It is separate from Serve because a node opens it before its root file system changes.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old control socket: %w", err)
	}
	listener, err := listenShort(path)
	if err != nil {
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	listener.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		listener.Close()
		return nil, fmt.Errorf("protect control socket: %w", err)
	}
	return listener, nil
}

// Serve starts the components and takes orders until the context ends; it then stops the components.
func Serve(ctx context.Context, listener *net.UnixListener, components []Component) error {
	if err := closeInherited(); err != nil {
		return err
	}
	s := &server{
		processes:  &processes{waiters: map[int]chan<- unix.WaitStatus{}},
		components: map[string]*component{},
	}
	ends := make(chan os.Signal, 64)
	signal.Notify(ends, unix.SIGCHLD)
	defer signal.Stop(ends)
	go s.processes.reap(ends)
	for _, c := range components {
		one := &component{Component: c, processes: s.processes, status: Status{Name: c.Name, State: Stopped}}
		s.components[c.Name] = one
		s.order = append(s.order, one)
		if !c.Hold {
			one.start(ctx)
		}
	}
	s.ctx = ctx
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	for {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return fmt.Errorf("accept orders: %w", err)
		}
		go s.handle(conn)
	}
	for i := len(s.order) - 1; i >= 0; i-- {
		s.order[i].stop()
	}
	return nil
}

type server struct {
	ctx        context.Context
	processes  *processes
	components map[string]*component
	order      []*component
}

func (s *server) handle(conn *net.UnixConn) {
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	r, files, err := receiveRequest(conn)
	if err != nil {
		_ = writeMessage(conn, response{Error: err.Error(), Done: true})
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	defer closeFiles(files)
	if r.Op == "exec" {
		err = s.exec(conn, r, files)
	} else {
		err = s.answer(conn, r)
	}
	if err != nil {
		_ = writeMessage(conn, response{Error: err.Error(), Done: true})
	}
}

// answer carries out a request that has one answer.
func (s *server) answer(conn *net.UnixConn, r request) error {
	reply := response{Done: true}
	if r.Op == "status" {
		for _, c := range s.order {
			reply.Components = append(reply.Components, c.report())
		}
		return writeMessage(conn, reply)
	}
	c, ok := s.components[r.Component]
	if !ok {
		return fmt.Errorf("no component %q here", r.Component)
	}
	switch r.Op {
	case "start":
		c.start(s.ctx)
	case "stop":
		c.stop()
	case "kill":
		if err := c.kill(unix.Signal(r.Signal)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown order %q", r.Op)
	}
	return writeMessage(conn, reply)
}

// exec runs a command with the client's files and passes its signals on. A client that goes away takes the command with it.
func (s *server) exec(conn *net.UnixConn, r request, files []*os.File) error {
	if len(r.Args) == 0 || len(files) != stdio {
		return errors.New("a command and three files are needed")
	}
	dir := r.Dir
	if dir == "" {
		dir = "/"
	}
	fds := make([]uintptr, 0, stdio)
	for _, file := range files {
		fds = append(fds, file.Fd())
	}
	pid, ended, err := s.processes.start(command{args: r.Args, env: append(os.Environ(), r.Env...), dir: dir, files: fds})
	if err != nil {
		return err
	}
	closeFiles(files)
	if err := writeMessage(conn, response{PID: pid}); err != nil {
		_ = s.processes.signal(pid, unix.SIGKILL, true)
		return err
	}
	go func() {
		reader := bufio.NewReader(conn)
		for {
			var r request
			if err := readMessage(reader, &r); err != nil {
				// After the command's end this finds nobody.
				_ = s.processes.signal(pid, unix.SIGKILL, true)
				return
			}
			_ = s.processes.signal(pid, unix.Signal(r.Signal), true)
		}
	}()
	status := <-ended
	return writeMessage(conn, response{Done: true, ExitCode: exitCode(status)})
}

// closeInherited makes sure that nothing started here inherits a descriptor from whoever started the supervisor: CRIU cannot dump a file whose mount
// it does not see.
func closeInherited() error {
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("mark inherited files: %w", err)
	}
	return nil
}
