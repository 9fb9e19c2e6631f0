package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Client gives orders to one supervisor.
type Client struct {
	Socket string
}

// ErrGone is returned when no supervisor listens: the node was never started or has been killed.
var ErrGone = errors.New("node does not run")

// ExitError is the end of a command that did not succeed.
type ExitError struct {
	Code int
}

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Code) }

// Command is a command to run in the node. Output goes where the writers point; an *os.File is handed over as it is, so that a
// terminal stays one.
type Command struct {
	Args   []string
	Env    []string
	Dir    string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Signals, when given, are passed on to the command.
	Signals <-chan os.Signal
}

// Status lists the components.
func (c Client) Status(ctx context.Context) ([]Status, error) {
	answer, err := c.order(ctx, request{Op: "status"})
	return answer.Components, err
}

// Start lets a stopped component run again.
func (c Client) Start(ctx context.Context, component string) error {
	_, err := c.order(ctx, request{Op: "start", Component: component})
	return err
}

// Stop ends a component and keeps it from being started again.
func (c Client) Stop(ctx context.Context, component string) error {
	_, err := c.order(ctx, request{Op: "stop", Component: component})
	return err
}

// Kill sends a signal to a component, which is started again afterwards like after any failure.
func (c Client) Kill(ctx context.Context, component string, signal unix.Signal) error {
	_, err := c.order(ctx, request{Op: "kill", Component: component, Signal: int(signal)})
	return err
}

func (c Client) order(ctx context.Context, r request) (response, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return response{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := sendRequest(conn, r, nil); err != nil {
		return response{}, err
	}
	var answer response
	if err := readMessage(bufio.NewReader(conn), &answer); err != nil {
		return response{}, fmt.Errorf("wait for %s: %w", r.Op, errors.Join(ctx.Err(), err))
	}
	if answer.Error != "" {
		return response{}, errors.New(answer.Error)
	}
	return answer, nil
}

func (c Client) dial(ctx context.Context) (*net.UnixConn, error) {
	conn, err := dialShort(ctx, c.Socket)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: nobody listens on %s", ErrGone, c.Socket)
	}
	if err != nil {
		return nil, fmt.Errorf("reach supervisor: %w", err)
	}
	return conn, nil
}

// Run runs a command to its end; a status other than zero is an *ExitError. When the context ends, so does the command.
func (c Client) Run(ctx context.Context, command Command) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	files, finish, err := command.files()
	if err != nil {
		return err
	}
	// Something that the command left behind may hold the output open for ever.
	unblock := context.AfterFunc(ctx, func() {
		for _, read := range finish.reads {
			_ = read.SetReadDeadline(time.Now())
		}
	})
	defer unblock()
	err = sendRequest(conn, request{Op: "exec", Args: command.Args, Env: command.Env, Dir: command.Dir}, files[:])
	finish.sent()
	if err == nil {
		err = command.wait(conn)
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("run %s: %w", command.Args[0], ctx.Err())
	}
	if copied := finish.done(); err == nil {
		err = copied
	}
	return err
}

func (command Command) wait(conn *net.UnixConn) error {
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case <-over:
				return
			case s, ok := <-command.Signals:
				if number, is := s.(unix.Signal); ok && is {
					_ = writeMessage(conn, request{Op: "signal", Signal: int(number)})
				} else if !ok {
					return
				}
			}
		}
	}()
	reader := bufio.NewReader(conn)
	for {
		var answer response
		if err := readMessage(reader, &answer); err != nil {
			return fmt.Errorf("run %s: connection to the node ended: %w", command.Args[0], err)
		}
		switch {
		case answer.Error != "":
			return fmt.Errorf("run %s: %s", command.Args[0], answer.Error)
		case answer.Done && answer.ExitCode != 0:
			return &ExitError{Code: answer.ExitCode}
		case answer.Done:
			return nil
		}
	}
}

// plumbing copies between the caller's readers and writers and the pipes that stand for them on the other side.
type plumbing struct {
	remote []*os.File
	reads  []*os.File
	output sync.WaitGroup
	input  *os.File
	errs   chan error
}

func (command Command) files() ([stdio]*os.File, *plumbing, error) {
	var files [stdio]*os.File
	p := &plumbing{errs: make(chan error, stdio)}
	fail := func(err error) ([stdio]*os.File, *plumbing, error) {
		p.sent()
		return files, nil, fmt.Errorf("prepare files of command: %w", err)
	}
	var err error
	if file, ok := command.Stdin.(*os.File); ok {
		files[0] = file
	} else if command.Stdin == nil {
		if files[0], err = os.Open(os.DevNull); err != nil {
			return fail(err)
		}
		p.remote = append(p.remote, files[0])
	} else {
		read, write, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		files[0], p.input = read, write
		p.remote = append(p.remote, read)
		go func() {
			// A command need not read its input to the end.
			_, _ = io.Copy(write, command.Stdin)
			write.Close()
		}()
	}
	for i, writer := range []io.Writer{command.Stdout, command.Stderr} {
		if file, ok := writer.(*os.File); ok {
			files[1+i] = file
			continue
		}
		// One pipe for both, when both are the same, keeps the order of lines and the writer free of races.
		if i == 1 && writer != nil && sameWriter(writer, command.Stdout) {
			files[2] = files[1]
			continue
		}
		if writer == nil {
			writer = io.Discard
		}
		read, write, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		files[1+i] = write
		p.remote = append(p.remote, write)
		p.reads = append(p.reads, read)
		p.output.Go(func() {
			defer read.Close()
			if _, err := io.Copy(writer, read); err != nil {
				p.errs <- fmt.Errorf("copy output: %w", err)
			}
		})
	}
	return files, p, nil
}

func sameWriter(a, b io.Writer) (same bool) {
	defer func() { _ = recover() }() // Writers that cannot be compared are different.
	return a == b
}

// sent closes this side's copies of what the command has now.
func (p *plumbing) sent() {
	closeFiles(p.remote)
	p.remote = nil
}

// done waits until the last output has been copied.
func (p *plumbing) done() error {
	if p.input != nil {
		p.input.Close()
	}
	p.output.Wait()
	select {
	case err := <-p.errs:
		return err
	default:
		return nil
	}
}
