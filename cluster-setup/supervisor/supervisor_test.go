package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The supervisor waits for every child of its process, so it runs in a process of its own: this test binary, called again.
const serveVariable = "SUPERVISOR_TEST_SOCKET"

func TestMain(m *testing.M) {
	if socket := os.Getenv(serveVariable); socket != "" {
		if err := serveForTest(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serveForTest(socket string) error {
	listener, err := Listen(socket)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	log := filepath.Join(filepath.Dir(socket), "log")
	return Serve(context.Background(), listener, []Component{
		{Name: "steady", Args: []string{"sleep", "1000"}, Log: log},
		{Name: "failing", Args: []string{"sh", "-c", "echo failing; exit 3"}, Log: log},
		{Name: "held", Args: []string{"sleep", "1000"}, Log: log, Hold: true},
		{Name: "waiting", Args: []string{"sleep", "1000"}, Log: log, WaitFor: "unix:" + filepath.Join(filepath.Dir(socket), "nothing")},
	})
}

func start(t *testing.T) Client {
	t.Helper()
	// Longer than the name of a Unix socket may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "control.sock")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serveVariable+"="+socket)
	cmd.Stderr = os.Stderr
	// Its children must not survive it, whatever happens to it.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client := Client{Socket: socket}
		for _, name := range []string{"steady", "failing", "held", "waiting"} {
			if err := client.Stop(t.Context(), name); err != nil && t.Context().Err() == nil {
				t.Error(err)
			}
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	return Client{Socket: socket}
}

// await asks until the component is as wanted.
func await(t *testing.T, client Client, name string, wanted func(Status) bool) Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		all, err := client.Status(ctx)
		if err != nil {
			t.Fatalf("waiting for %s: %v", name, err)
		}
		for _, one := range all {
			if one.Name == name && wanted(one) {
				return one
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func runs(s Status) bool { return s.State == Running }

func TestKilledComponentIsStartedAgain(t *testing.T) {
	t.Parallel()
	client := start(t)
	before := await(t, client, "steady", runs)
	if err := client.Kill(t.Context(), "steady", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	after := await(t, client, "steady", func(s Status) bool { return s.State == Running && s.Restarts == 1 })
	if after.PID == before.PID || after.LastExit != "signal SIGKILL" {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

func TestStoppedComponentStaysStopped(t *testing.T) {
	t.Parallel()
	client := start(t)
	pid := await(t, client, "steady", runs).PID
	if err := client.Stop(t.Context(), "steady"); err != nil {
		t.Fatal(err)
	}
	await(t, client, "steady", func(s Status) bool { return s.State == Stopped && s.Restarts == 0 })
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
	if err := client.Start(t.Context(), "steady"); err != nil {
		t.Fatal(err)
	}
	await(t, client, "steady", runs)
}

func TestComponentsInOtherStates(t *testing.T) {
	t.Parallel()
	client := start(t)
	await(t, client, "failing", func(s Status) bool { return s.Restarts >= 1 && s.LastExit == "exit status 3" })
	await(t, client, "held", func(s Status) bool { return s.State == Stopped })
	await(t, client, "waiting", func(s Status) bool { return s.State == Waiting })
	if err := client.Start(t.Context(), "held"); err != nil {
		t.Fatal(err)
	}
	await(t, client, "held", runs)
	if err := client.Kill(t.Context(), "nobody", unix.SIGKILL); err == nil {
		t.Error("an unknown component was killed")
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	client := start(t)
	for _, test := range []struct {
		name, script, input, output string
		code                        int
	}{
		{"output", "echo out; echo err >&2", "", "out\nerr\n", 0},
		{"input", "cat", "hello", "hello", 0},
		{"environment", "echo $GIVEN", "", "yes\n", 0},
		{"replaced variable", "env | grep ^LANG=", "", "LANG=given\n", 0},
		{"status", "exit 7", "", "", 7},
		{"signal", "kill -TERM $$", "", "", 128 + int(unix.SIGTERM)},
		{"no stray files", "ls /proc/self/fd | wc -l", "", "4\n", 0}, // Three and the folder itself.
	} {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			err := client.Run(t.Context(), Command{
				Args: []string{"sh", "-c", test.script}, Env: []string{"LANG=first", "GIVEN=yes", "LANG=given"},
				Stdin: strings.NewReader(test.input), Stdout: &out, Stderr: &out,
			})
			var ended *ExitError
			code := 0
			if errors.As(err, &ended) {
				code = ended.Code
			} else if err != nil {
				t.Fatal(err)
			}
			if code != test.code || out.String() != test.output {
				t.Errorf("got %d %q, want %d %q", code, out.String(), test.code, test.output)
			}
		})
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	t.Parallel()
	client := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	var out writer = func(line string) {
		if strings.Contains(line, "begun") {
			cancel()
		}
	}
	err := client.Run(ctx, Command{Args: []string{"sh", "-c", "echo begun; sleep 1000"}, Stdout: out})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	t.Parallel()
	if _, err := (Client{Socket: filepath.Join(t.TempDir(), "control.sock")}).Status(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("got %v, want %v", err, ErrGone)
	}
}

type writer func(string)

func (w writer) Write(p []byte) (int, error) {
	w(string(p))
	return len(p), nil
}
