package runc

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers of linux/userfaultfd.h that golang.org/x/sys does not have.
const (
	uffdAPI             = 0xAA
	uffdioAPI           = 0xc018aa3f
	uffdFeatureWPAsync  = 1 << 15
	uffdUserModeOnly    = 1
	pagemapSoftDirtyBit = 1 << 55
)

type uffdioAPIArg struct{ api, features, ioctls uint64 }

// userfaultFeatures asks the kernel for asynchronous write protection, which comes
// with PAGEMAP_SCAN, and for userfaultfd at all.
func userfaultFeatures() (tracking, lazy bool) {
	open := func(features uint64) bool {
		fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|uffdUserModeOnly, 0, 0)
		if errno != 0 {
			return false
		}
		defer unix.Close(int(fd))
		arg := uffdioAPIArg{api: uffdAPI, features: features}
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(&arg)))
		return errno == 0
	}
	return open(uffdFeatureWPAsync), open(0)
}

// softDirty tells whether the kernel tracks written pages in pagemap: a page that
// was just written has the bit set, where the bit exists.
func softDirty() bool {
	mem, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Munmap(mem) }()
	mem[0] = 1
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer f.Close()
	var b [8]byte
	addr := uintptr(unsafe.Pointer(&mem[0]))
	if _, err := f.ReadAt(b[:], int64(addr/uintptr(os.Getpagesize())*8)); err != nil {
		return false
	}
	return binary.LittleEndian.Uint64(b[:])&pagemapSoftDirtyBit != 0
}
