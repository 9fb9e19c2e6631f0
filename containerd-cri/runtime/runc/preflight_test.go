package runc

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// own scans the test process itself, as if it were a container.
func own(t *testing.T) *runtime.Report {
	t.Helper()
	pid := os.Getpid()
	report := &runtime.Report{}
	s := &scan{c: runtime.Container{ID: "own", Pid: pid}, pids: []int{pid}, proc: "/proc", report: report, tcp: connections{}}
	s.container()
	s.tcp.report(report)
	return report
}

func codes(r *runtime.Report, fd int) []string {
	var out []string
	for _, f := range r.Findings {
		if f.FD == fd {
			out = append(out, f.Code)
		}
		if f.Message == "" || f.Cure == "" {
			out = append(out, "without words")
		}
	}
	return out
}

// TestFindings opens what can not be moved in the test process itself and expects
// it to be named.
func TestFindings(t *testing.T) {
	file := func(t *testing.T) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), "file"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	socket := func(t *testing.T, domain, typ, proto int) int {
		fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, proto)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	for _, tc := range []struct {
		name string
		open func(*testing.T) int
		want string
	}{
		{"a plain file", func(t *testing.T) int { return int(file(t).Fd()) }, ""},
		{"a small deleted file", func(t *testing.T) int {
			f := file(t)
			os.Remove(f.Name())
			return int(f.Fd())
		}, ""},
		{"a large deleted file", func(t *testing.T) int {
			f := file(t)
			os.Remove(f.Name())
			if err := unix.Fallocate(int(f.Fd()), 0, 0, ghostLimit+4096); err != nil {
				t.Fatal(err)
			}
			return int(f.Fd())
		}, "DeletedFile"},
		{"a deleted file with another name", func(t *testing.T) int {
			f := file(t)
			if err := os.Link(f.Name(), f.Name()+"2"); err != nil {
				t.Fatal(err)
			}
			os.Remove(f.Name())
			return int(f.Fd())
		}, "DeletedFile"},
		{"a multipath TCP socket", func(t *testing.T) int { return socket(t, unix.AF_INET, unix.SOCK_STREAM, protoMPTCP) }, "MPTCP"},
		{"a TCP socket", func(t *testing.T) int { return socket(t, unix.AF_INET, unix.SOCK_STREAM, 0) }, ""},
		{"a UDP socket", func(t *testing.T) int { return socket(t, unix.AF_INET6, unix.SOCK_DGRAM, 0) }, ""},
		{"a null device", func(t *testing.T) int { return open(t, "/dev/null") }, ""},
		{"an eventfd", func(t *testing.T) int {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Close(fd) })
			return fd
		}, ""},
		{"a userfaultfd", func(t *testing.T) int {
			fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|uffdUserModeOnly, 0, 0)
			if errno != 0 {
				t.Fatal(errno)
			}
			t.Cleanup(func() { unix.Close(int(fd)) })
			return int(fd)
		}, "Userfaultfd"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fd := tc.open(t)
			got := codes(own(t), fd)
			if tc.want == "" && len(got) != 0 || tc.want != "" && !slices.Equal(got, []string{tc.want}) {
				t.Errorf("found %v, want %q", got, tc.want)
			}
		})
	}
}

// TestConnections makes connections, of which this process has both ends, and expects
// one finding with their number and where they are.
func TestConnections(t *testing.T) {
	established := func() string {
		var found []string
		for _, f := range own(t).Findings {
			if f.Code == "EstablishedTCP" {
				if f.Blocking || f.Cure == "" {
					t.Errorf("%+v", f)
				}
				found = append(found, f.Message)
			}
		}
		if len(found) > 1 {
			t.Errorf("%d findings: %q", len(found), found)
		}
		return strings.Join(found, "")
	}
	if got := established(); got != "" {
		t.Errorf("without connections: %s", got)
	}
	for n, where := range []string{"tcp4 127.0.0.1:0", "tcp6 [::1]:0", "tcp 127.0.0.1:0"} {
		network, host, _ := strings.Cut(where, " ")
		l, err := net.Listen(network, host)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		c, err := net.Dial(network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close() })
		want := fmt.Sprintf("%d TCP connections are established", n+1)
		if n == 0 {
			want = "The TCP connection between 127.0.0.1:"
		}
		if got := established(); !strings.HasPrefix(got, want) {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func open(t *testing.T, path string) int {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

func TestMovableDevice(t *testing.T) {
	for _, tc := range []struct {
		name         string
		major, minor uint32
		want         bool
	}{
		{"/dev/null", 1, 3, true},
		{"/dev/mem", 1, 1, false},
		{"/dev/tty", 5, 0, true},
		{"a terminal", 136, 4, true},
		{"/dev/kvm", 10, 232, false},
		{"a graphics card", 195, 0, false},
	} {
		if got := movableDevice(tc.major, tc.minor); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestMemoryIsCounted(t *testing.T) {
	if n := own(t).MemoryBytes; n < 1<<20 {
		t.Errorf("the test process needs %d bytes", n)
	}
}

func TestOwnGroup(t *testing.T) {
	c := runtime.Container{ID: "abc"}
	for _, tc := range []struct{ name, group, want string }{
		{"cgroupfs", "/kubepods/pod1/abc", "/kubepods/pod1/abc"},
		{"systemd", "/kubepods.slice/pod1.slice/cri-containerd-abc.scope", "/kubepods.slice/pod1.slice/cri-containerd-abc.scope"},
		{"a group inside the container", "/kubepods/pod1/abc/init.scope", "/kubepods/pod1/abc"},
		{"another container", "/kubepods/pod1/xyz", ""},
		{"the root", "/", ""},
		{"outside the namespace", "/../abc", ""},
	} {
		got, err := ownGroup(tc.group, c)
		if got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%s: %q, %v", tc.name, got, err)
		}
	}
}

// TestFreezer drives the files of a control group of version 2.
func TestFreezer(t *testing.T) {
	dir := t.TempDir()
	put := func(name, s string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("cgroup.freeze", "0")
	put("cgroup.events", "populated 1\nfrozen 0\n")
	f := freezer{dir: dir, v2: true}
	if err := f.set(true); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "cgroup.freeze")); string(b) != "1" {
		t.Errorf("cgroup.freeze is %q", b)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := f.await(ctx); err == nil {
		t.Error("a group that does not freeze is reported frozen")
	}
	put("cgroup.events", "populated 1\nfrozen 1\n")
	if err := f.await(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestLogErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "dump.log")
	log := "(00.1) all well\n(00.2)      1: Error (criu/tun.c:85): cause\n(00.3) Error (criu/cr-dump.c:2128): Dumping FAILED.\n"
	if err := os.WriteFile(file, []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := LogErrors(file), "Error (criu/tun.c:85): cause; Error (criu/cr-dump.c:2128): Dumping FAILED."; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := LogErrors(file + "x"); got != "" {
		t.Errorf("%q from no file", got)
	}
}

func TestLimits(t *testing.T) {
	for r := range 16 {
		var want unix.Rlimit
		if err := unix.Getrlimit(r, &want); err != nil {
			t.Fatal(err)
		}
		soft, hard, err := limits("/proc/self/limits", r)
		// Go raises the soft limit of open files for itself and hides it.
		if err != nil || hard != want.Max || (soft != want.Cur && r != unix.RLIMIT_NOFILE) {
			t.Errorf("resource %d: %d, %d, %v, want %v", r, soft, hard, err, want)
		}
	}
	if _, _, err := limits("/proc/self/limits", 99); err == nil {
		t.Error("a resource that does not exist has limits")
	}
}

// TestVisitors: what exec has started is a finding only when it stays.
func TestVisitors(t *testing.T) {
	for _, tc := range []struct {
		name string
		stay bool
	}{{"one that ends", false}, {"one that stays", true}} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command("cat")
			end, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var report runtime.Report
			// The container of which cat is a process has another first one.
			s := &scan{c: runtime.Container{ID: "own", Pid: 1}, pids: []int{cmd.Process.Pid}, proc: "/proc", report: &report}
			s.container()
			if got := codes(&report, -1); !slices.Contains(got, codeExec) {
				t.Fatalf("found %v", got)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if !tc.stay {
				ctx = t.Context()
				end.Close()
			}
			leave(ctx, &report)
			if got := slices.Contains(codes(&report, -1), codeExec); got != tc.stay {
				t.Errorf("found %v", report.Findings)
			}
			end.Close()
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}
