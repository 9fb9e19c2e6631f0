package runc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// ghostLimit is the size up to which a deleted but open file moves; it is also in
// dumpOptions.
const ghostLimit = 64 << 20

// Preflight implements runtime.Runtime. It looks at every process of the containers
// while they run, so what it sees may change before the freeze; CRIU has the last
// word. It never stops a process: sockets are inspected through duplicates.
func (r *Runtime) Preflight(ctx context.Context, cs []runtime.Container) (runtime.Report, error) {
	var report runtime.Report
	tcp := connections{}
	for _, c := range cs {
		f, err := r.cgroups.of(c)
		if err != nil {
			return report, err
		}
		pids, err := f.pids()
		if err != nil {
			return report, err
		}
		s := &scan{c: c, pids: pids, proc: r.cgroups.procDir(), report: &report, tcp: tcp}
		s.container()
		if err := ctx.Err(); err != nil {
			return report, err
		}
	}
	leave(ctx, &report)
	tcp.report(&report)
	return report, ctx.Err()
}

// leave takes back what was found in visitors that end soon.
func leave(ctx context.Context, report *runtime.Report) {
	var guests []int
	for _, f := range report.Findings {
		if f.Code == codeExec {
			guests = append(guests, f.Pid)
		}
	}
	stay := awaitEnd(ctx, guests, visitPreflight)
	report.Findings = slices.DeleteFunc(report.Findings, func(f runtime.Finding) bool {
		return slices.Contains(guests, f.Pid) && !slices.Contains(stay, f.Pid)
	})
}

const codeExec = "ExecSession"

// scan inspects one container.
type scan struct {
	c      runtime.Container
	pids   []int // the processes of the container
	proc   string
	report *runtime.Report
	tcp    connections
}

func (s *scan) add(blocking bool, pid, fd int, code, message, cure string) {
	s.report.Findings = append(s.report.Findings, runtime.Finding{
		Blocking: blocking, Code: code, ContainerID: s.c.ID, Pid: pid, FD: fd, Message: message, Cure: cure,
	})
}

func (s *scan) path(pid int, elem ...string) string {
	return filepath.Join(append([]string{s.proc, strconv.Itoa(pid)}, elem...)...)
}

func (s *scan) container() {
	for _, pid := range s.pids {
		st := s.status(pid)
		s.report.MemoryBytes += (st["RssAnon"] + st["RssShmem"] + st["VmSwap"]) << 10
		if t := st["TracerPid"]; t != 0 {
			s.add(true, pid, -1, "Traced", fmt.Sprintf("The process is traced by process %d, and only one tracer is possible.", t), "End the debugger or tracer.")
		}
		if visitor(s.c, s.pids, pid, int(st["PPid"])) {
			s.add(true, pid, -1, codeExec, fmt.Sprintf("The process %s was started by exec and belongs to somebody outside the container.", s.name(pid)), "End kubectl exec sessions and exec probes of the pod, then try again.")
		}
		s.namespaces(pid)
		s.maps(pid)
		s.files(pid)
	}
}

// status returns the numbers of /proc/PID/status; a process that is gone has none.
func (s *scan) status(pid int) map[string]uint64 {
	out := map[string]uint64{}
	b, err := os.ReadFile(s.path(pid, "status"))
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(b)) {
		key, val, _ := strings.Cut(line, ":")
		if f := strings.Fields(val); len(f) > 0 {
			if n, err := strconv.ParseUint(f[0], 10, 64); err == nil {
				out[key] = n
			}
		}
	}
	return out
}

func (s *scan) name(pid int) string {
	b, _ := os.ReadFile(s.path(pid, "comm"))
	return strconv.Quote(strings.TrimSpace(string(b)))
}

// namespaces finds processes that have left the namespaces of their container.
func (s *scan) namespaces(pid int) {
	if pid == s.c.Pid {
		return
	}
	for _, ns := range []string{"pid", "net", "user", "mnt", "ipc", "uts"} {
		own, err1 := os.Readlink(s.path(pid, "ns", ns))
		init, err2 := os.Readlink(s.path(s.c.Pid, "ns", ns))
		if err1 == nil && err2 == nil && own != init {
			s.add(true, pid, -1, "NestedNamespace", fmt.Sprintf("The process %s has made itself a %s namespace, which does not move.", s.name(pid), ns), "Run no sandboxes, nested containers or unshare in the container.")
		}
	}
}

// maps finds mapped objects that can not be restored.
func (s *scan) maps(pid int) {
	f, err := os.Open(s.path(pid, "maps"))
	if err != nil {
		return
	}
	defer f.Close()
	seen := map[string]bool{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.SplitN(sc.Text(), " ", 6)
		if len(fields) < 6 {
			continue
		}
		name := strings.TrimSpace(fields[5])
		if seen[name] {
			continue
		}
		seen[name] = true
		switch {
		case strings.HasPrefix(name, "anon_inode:[io_uring]"):
			s.ioUring(pid, -1)
		case strings.HasPrefix(name, "/secretmem"):
			s.add(true, pid, -1, "SecretMemory", "The process has secret memory, which nobody else can read.", "Turn off the use of memfd_secret in the program.")
		case strings.HasPrefix(name, "/dev/") && !plainDevice(name):
			s.add(true, pid, -1, "Device", fmt.Sprintf("The process has the device %s mapped, whose state is not in memory.", name), "Remove the device from the pod.")
		}
	}
}

// plainDevice tells whether a mapped path below /dev is ordinary memory.
func plainDevice(name string) bool {
	name = strings.TrimSuffix(name, " (deleted)")
	return name == "/dev/zero" || strings.HasPrefix(name, "/dev/shm/")
}

func (s *scan) ioUring(pid, fd int) {
	s.add(true, pid, fd, "IOUring", fmt.Sprintf("The process %s uses io_uring, which CRIU can not dump.", s.name(pid)), "Turn io_uring off in the program, or forbid it with seccomp so that the program falls back.")
}

func (s *scan) files(pid int) {
	entries, err := os.ReadDir(s.path(pid, "fd"))
	if err != nil {
		return
	}
	pidfd := -1
	defer func() {
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
	}()
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		link, err := os.Readlink(s.path(pid, "fd", e.Name()))
		if err != nil {
			continue // Closed meanwhile.
		}
		switch {
		case strings.HasPrefix(link, "socket:"):
			if pidfd < 0 {
				if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
					return // The process has ended.
				}
			}
			s.socket(pidfd, pid, fd)
		case strings.HasPrefix(link, "anon_inode:"):
			s.anonymous(pid, fd, strings.TrimPrefix(link, "anon_inode:"))
		case strings.HasPrefix(link, "/"):
			s.file(pid, fd, link)
		}
	}
}

// dumpable are the anonymous files that CRIU knows.
var dumpable = []string{"[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]"}

func (s *scan) anonymous(pid, fd int, kind string) {
	switch {
	case slices.Contains(dumpable, kind):
	case kind == "[io_uring]":
		s.ioUring(pid, fd)
	case kind == "[userfaultfd]":
		s.add(true, pid, fd, "Userfaultfd", fmt.Sprintf("The process %s handles its own page faults (userfaultfd), which CRIU can not dump.", s.name(pid)), "Turn userfaultfd off in the program.")
	default:
		s.add(true, pid, fd, "UnsupportedFile", fmt.Sprintf("The process %s has an open %s, which CRIU can not dump.", s.name(pid), strings.Trim(kind, "[]")), "Turn the feature that opens it off in the program.")
	}
}

func (s *scan) file(pid, fd int, link string) {
	var st unix.Stat_t
	if err := unix.Stat(s.path(pid, "fd", strconv.Itoa(fd)), &st); err != nil {
		return
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		s.add(true, pid, fd, "Device", fmt.Sprintf("The process %s has the block device %s open.", s.name(pid), link), "Remove the device from the pod.")
	case unix.S_IFCHR:
		if !movableDevice(unix.Major(st.Rdev), unix.Minor(st.Rdev)) {
			s.add(true, pid, fd, "Device", fmt.Sprintf("The process %s has the device %s open, whose state does not move.", s.name(pid), link), "Remove the device from the pod.")
		}
	case unix.S_IFREG:
		if !strings.HasSuffix(link, " (deleted)") || strings.HasPrefix(link, "/memfd:") || strings.HasPrefix(link, "/SYSV") || strings.HasPrefix(link, "/dev/zero") {
			return
		}
		if st.Nlink > 0 {
			s.add(true, pid, fd, "DeletedFile", fmt.Sprintf("The process %s has %s open, which was removed but still has another name.", s.name(pid), link), "Let the program open the file again under a name it has.")
		} else if st.Blocks*512 > ghostLimit {
			s.add(true, pid, fd, "DeletedFile", fmt.Sprintf("The process %s has the deleted file %s of %d MiB open; at most %d MiB move.", s.name(pid), link, st.Blocks>>11, ghostLimit>>20), "Let the program close the file, or use a file with a name.")
		}
	}
}

// movableDevice names the character devices that CRIU restores: memory devices
// (null, zero, full, random, urandom) and terminals.
func movableDevice(major, minor uint32) bool {
	switch major {
	case 1:
		return slices.Contains([]uint32{3, 5, 7, 8, 9}, minor)
	case 5:
		return minor == 0 || minor == 2
	}
	return major >= 136 && major <= 143
}

const protoMPTCP = 262

func (s *scan) socket(pidfd, pid, fd int) {
	dup, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return // Closed meanwhile.
	}
	defer unix.Close(dup)
	option := func(name int) int {
		n, err := unix.GetsockoptInt(dup, unix.SOL_SOCKET, name)
		if err != nil {
			return -1
		}
		return n
	}
	domain, proto := option(unix.SO_DOMAIN), option(unix.SO_PROTOCOL)
	switch domain {
	case unix.AF_UNIX:
		s.unixSocket(dup, pid, fd)
	case unix.AF_INET, unix.AF_INET6:
		switch proto {
		case protoMPTCP:
			s.add(true, pid, fd, "MPTCP", fmt.Sprintf("The process %s has a multipath TCP socket on %s, which CRIU can not dump.", s.name(pid), address(unix.Getsockname(dup))), "Set GODEBUG=multipathtcp=0 in the environment of Go programs, or turn multipath TCP off.")
		case unix.IPPROTO_TCP:
			if info, err := unix.GetsockoptTCPInfo(dup, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil && info.State == 1 {
				s.tcp.add(dup)
			}
		case unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		default:
			if option(unix.SO_TYPE) != unix.SOCK_RAW {
				s.add(true, pid, fd, "Socket", fmt.Sprintf("The process %s has a socket of IP protocol %d, which CRIU can not dump.", s.name(pid), proto), "Turn the protocol off in the program.")
			}
		}
	case unix.AF_NETLINK, unix.AF_PACKET:
	default:
		s.add(true, pid, fd, "Socket", fmt.Sprintf("The process %s has a socket of address family %d, which CRIU can not dump.", s.name(pid), domain), "Turn the feature that opens it off in the program.")
	}
}

// unixSocket finds connections that leave the container: each is dumped by itself, so
// the other containers of the pod are elsewhere, too.
func (s *scan) unixSocket(dup, pid, fd int) {
	if _, err := unix.Getpeername(dup); err != nil {
		return
	}
	cred, err := unix.GetsockoptUcred(dup, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Pid <= 0 || slices.Contains(s.pids, int(cred.Pid)) {
		return
	}
	// The peer is named by who connected or listened. If that process has ended, a
	// child of it may hold the socket, so nothing is known.
	if _, err := os.Stat(s.path(int(cred.Pid))); errors.Is(err, fs.ErrNotExist) {
		return
	}
	s.add(true, pid, fd, "UnixSocketOutside", fmt.Sprintf("The process %s is connected by a unix socket to process %d (%s), which is not in its container.", s.name(pid), cred.Pid, s.name(int(cred.Pid))), "Close the connection, or use TCP between the containers of the pod; sockets of the node tie a pod to its node.")
}
