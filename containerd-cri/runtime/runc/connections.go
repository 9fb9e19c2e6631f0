package runc

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// connections are the established TCP connections of a pod. The move closes them,
// those between its containers, too. The key is the two addresses in order, so that
// both ends of one, and a socket that several processes have, count once.
type connections map[[2]netip.AddrPort]struct{}

// add notes the connection of a socket.
func (c connections) add(fd int) {
	key := [2]netip.AddrPort{address(unix.Getsockname(fd)), address(unix.Getpeername(fd))}
	if !key[0].IsValid() || !key[1].IsValid() {
		return // Closed meanwhile.
	}
	slices.SortFunc(key[:], netip.AddrPort.Compare)
	c[key] = struct{}{}
}

// report says so in one finding, however many there are.
func (c connections) report(r *runtime.Report) {
	if len(c) == 0 {
		return
	}
	first := slices.MinFunc(slices.Collect(maps.Keys(c)), func(a, b [2]netip.AddrPort) int {
		return cmp.Or(a[0].Compare(b[0]), a[1].Compare(b[1]))
	})
	message := fmt.Sprintf("The TCP connection between %s and %s is established and will be closed by the move.", first[0], first[1])
	if len(c) > 1 {
		message = fmt.Sprintf("%d TCP connections are established and will be closed by the move, among them that between %s and %s.", len(c), first[0], first[1])
	}
	r.Findings = append(r.Findings, runtime.Finding{
		Code: "EstablishedTCP", FD: -1, Message: message, Cure: "Whoever is at the other end has to connect again.",
	})
}

// address is that of an IP socket; the zero value if it has none.
func address(sa unix.Sockaddr, err error) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		// A connection over IPv4 can belong to an IPv6 socket.
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}
