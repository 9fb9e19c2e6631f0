// Package supervisor is the first process of a node of the local cluster: it starts the node's components, starts them again
// when they end, reaps orphans, and takes orders over a Unix socket.
//
// It does what systemd does on a real node, as far as a test needs it, and adds what a test wants: stop, start or kill exactly
// one component, and run a command inside the node with the caller's own terminal. It knows nothing about namespaces; whoever
// starts it has entered them.
package supervisor

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Component is a program that should always run.
type Component struct {
	Name string   `json:"name"`
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"`
	Log  string   `json:"log"`
	// WaitFor must accept a connection before the component starts: "unix:/path" or "tcp:host:port".
	WaitFor string `json:"waitFor,omitempty"`
	// Hold leaves the component stopped until it is ordered to start.
	Hold bool `json:"hold,omitempty"`
}

// Status describes a component at one moment.
type Status struct {
	Name     string `json:"name"`
	State    State  `json:"state"`
	PID      int    `json:"pid,omitempty"` // As the supervisor's PID namespace numbers it.
	Restarts int    `json:"restarts"`
	LastExit string `json:"lastExit,omitempty"`
}

// State of a component.
type State string

// A component waits for what it needs or for the pause after a failure, runs, or was stopped on request.
const (
	Waiting State = "waiting"
	Running State = "running"
	Stopped State = "stopped"
)

type request struct {
	Op        string   `json:"op"`
	Component string   `json:"component,omitempty"`
	Signal    int      `json:"signal,omitempty"`
	Args      []string `json:"args,omitempty"`
	Env       []string `json:"env,omitempty"`
	Dir       string   `json:"dir,omitempty"`
}

type response struct {
	Error      string   `json:"error,omitempty"`
	Components []Status `json:"components,omitempty"`
	PID        int      `json:"pid,omitempty"`
	Done       bool     `json:"done,omitempty"`
	ExitCode   int      `json:"exitCode,omitempty"`
}

// stdio is the number of descriptors that accompany a request to run a command.
const stdio = 3

// maxRequest bounds what a client can make the supervisor hold: an argument list and an environment.
const maxRequest = 4 << 20

func writeMessage(w io.Writer, message any) error {
	data, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if _, err := w.Write(append(data, '\n')); err != nil {
		return fmt.Errorf("send message: %w", err)
	}
	return nil
}

func readMessage(r *bufio.Reader, message any) error {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, message); err != nil {
		return fmt.Errorf("decode message: %w", err)
	}
	return nil
}

// sendRequest writes the request with the files attached to its first byte.
func sendRequest(conn *net.UnixConn, r request, files []*os.File) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	data = append(data, '\n')
	var fds []int
	for _, file := range files {
		fds = append(fds, int(file.Fd()))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(data, rights, nil)
	if err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	// Nothing may be written once the request is complete: its receiver answers and leaves.
	if n < len(data) {
		if _, err := conn.Write(data[n:]); err != nil {
			return fmt.Errorf("send request: %w", err)
		}
	}
	return nil
}

// receiveRequest reads one request and the files that came with it.
func receiveRequest(conn *net.UnixConn) (r request, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeFiles(files)
			files = nil
		}
	}()
	var data []byte
	buffer := make([]byte, 64<<10)
	rights := make([]byte, unix.CmsgSpace(4*stdio))
	for {
		n, nrights, _, _, err := conn.ReadMsgUnix(buffer, rights)
		if err != nil {
			return r, files, err
		}
		received, err := parseRights(rights[:nrights])
		files = append(files, received...)
		if err != nil {
			return r, files, err
		}
		if n == 0 {
			return r, files, io.ErrUnexpectedEOF
		}
		data = append(data, buffer[:n]...)
		if data[len(data)-1] == '\n' {
			break
		}
		if len(data) > maxRequest {
			return r, files, errors.New("request is too long")
		}
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, files, fmt.Errorf("decode request: %w", err)
	}
	return r, files, nil
}

func parseRights(data []byte) ([]*os.File, error) {
	if len(data) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(data)
	if err != nil {
		return nil, fmt.Errorf("parse attached files: %w", err)
	}
	var files []*os.File
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			return files, fmt.Errorf("parse attached files: %w", err)
		}
		for _, fd := range fds {
			// Whatever starts next must not inherit it: CRIU cannot dump a file it does not know.
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "attached"))
		}
	}
	return files, nil
}

func closeFiles(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}
