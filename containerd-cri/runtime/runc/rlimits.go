package runc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CRIU reads the resource limits of the processes it dumps with prlimit, which
// needs CAP_SYS_RESOURCE when a process runs as another user. A runtime inside a
// container often lacks that capability, though /proc/PID/limits tells the same to
// everybody. There, the kernel hands CRIU's question to this process (seccomp user
// notification), which answers it from /proc.

// Numbers of linux/seccomp.h that golang.org/x/sys does not have.
const (
	seccompNotifRecv = 0xc0502100
	seccompNotifSend = 0xc0182101
	seccompContinue  = 1
)

type seccompNotif struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type seccompResp struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// mayReadLimits tells whether this process has the capability.
func mayReadLimits() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&hdr, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// answerLimits makes the calling thread, and the processes it starts, ask this
// process for the limits of other processes. The thread must not be used for
// anything else afterwards.
func answerLimits() error {
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(k uint32, jt, jf uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: jt, Jf: jf, K: k}
	}
	const load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	// Only questions about another process and without new limits: the start of a
	// program sets its own, and nobody may wait for this process then.
	prog := []unix.SockFilter{
		stmt(load, 0), // system call
		jump(unix.SYS_PRLIMIT64, 0, 6),
		stmt(load, 16), // process, lower half
		jump(0, 4, 0),
		stmt(load, 32), // new limits, lower half
		jump(0, 0, 2),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_USER_NOTIF),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("seccomp listener: %w", errno)
	}
	go serveLimits(int(fd))
	return nil
}

// serveLimits ends when the last process with the filter has ended.
func serveLimits(fd int) {
	defer unix.Close(fd)
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if p[0].Revents&unix.POLLIN == 0 {
			if p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0 {
				return
			}
			continue
		}
		var n seccompNotif
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), seccompNotifRecv, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue // The asking process has ended.
		}
		r := seccompResp{id: n.id}
		if err := answer(&n); err != nil {
			// The kernel's own answer is the right one.
			r.flags = seccompContinue
		}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), seccompNotifSend, uintptr(unsafe.Pointer(&r)))
	}
}

func answer(n *seccompNotif) error {
	soft, hard, err := limits(fmt.Sprintf("/proc/%d/limits", int32(n.args[0])), int(n.args[1]))
	if err != nil {
		return err
	}
	var b bytes.Buffer
	_ = binary.Write(&b, binary.NativeEndian, [2]uint64{soft, hard})
	local := []unix.Iovec{{Base: &b.Bytes()[0]}}
	local[0].SetLen(b.Len())
	_, err = unix.ProcessVMWritev(int(n.pid), local, []unix.RemoteIovec{{Base: uintptr(n.args[3]), Len: b.Len()}}, 0)
	return err
}

// limits reads one line of /proc/PID/limits; they are in the order of their
// numbers, behind a heading.
func limits(file string, resource int) (soft, hard uint64, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, 0, err
	}
	lines := strings.Split(string(b), "\n")
	if resource < 0 || resource+1 >= len(lines) || len(lines[resource+1]) < 60 {
		return 0, 0, fmt.Errorf("no resource %d in %s", resource, file)
	}
	// The name is 25 columns wide.
	f := strings.Fields(lines[resource+1][25:])
	if len(f) < 2 {
		return 0, 0, fmt.Errorf("no limits in %q", lines[resource+1])
	}
	parse := func(s string) uint64 {
		if s == "unlimited" {
			return math.MaxUint64
		}
		n, perr := strconv.ParseUint(s, 10, 64)
		if perr != nil {
			err = perr
		}
		return n
	}
	return parse(f[0]), parse(f[1]), err
}
