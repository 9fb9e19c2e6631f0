package runc

import (
	"fmt"
	goruntime "runtime"

	"golang.org/x/sys/unix"
)

// HostName returns the names that processes in a UTS namespace see. path is the
// namespace's file.
func HostName(path string) (host, domain string, err error) {
	type names struct {
		host, domain string
		err          error
	}
	done := make(chan names, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine and is not reused.
		goruntime.LockOSThread()
		var n names
		n.host, n.domain, n.err = readHostName(path)
		done <- n
	}()
	n := <-done
	if n.err != nil {
		return "", "", fmt.Errorf("host name of the pod: %w", n.err)
	}
	return n.host, n.domain, nil
}

func readHostName(path string) (host, domain string, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", "", err
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWUTS); err != nil {
		return "", "", err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", "", err
	}
	return unix.ByteSliceToString(u.Nodename[:]), unix.ByteSliceToString(u.Domainname[:]), nil
}
