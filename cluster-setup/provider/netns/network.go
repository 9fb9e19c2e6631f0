package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// bridge connects all machines of a cluster; it lives in the hub's network namespace.
const bridge = "br0"

// in opens a netlink connection inside the network namespace of a process.
func in(pid int) (*netlink.Handle, netns.NsHandle, error) {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, 0, fmt.Errorf("open network namespace: %w", err)
	}
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, 0, fmt.Errorf("open netlink: %w", err)
	}
	return handle, ns, nil
}

// within calls do with a netlink connection inside the network namespace of a process.
func within(pid int, do func(*netlink.Handle, netns.NsHandle) error) error {
	handle, ns, err := in(pid)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer handle.Close()
	return do(handle, ns)
}

// ConnectHub makes the bridge in a new machine and gives it the address.
func ConnectHub(pid int, address netip.Prefix) error {
	return within(pid, func(handle *netlink.Handle, _ netns.NsHandle) error {
		if err := loopback(handle); err != nil {
			return err
		}
		attributes := netlink.NewLinkAttrs()
		attributes.Name = bridge
		link := &netlink.Bridge{LinkAttrs: attributes}
		if err := handle.LinkAdd(link); err != nil {
			return fmt.Errorf("make bridge: %w", err)
		}
		return up(handle, bridge, address)
	})
}

// ConnectNode joins a new machine to the hub's bridge. Port names the hub's end of the cable.
func ConnectNode(hub, node int, port string, address netip.Prefix, gateway netip.Addr) error {
	return within(node, func(inNode *netlink.Handle, nodeNS netns.NsHandle) error {
		if err := loopback(inNode); err != nil {
			return err
		}
		err := within(hub, func(inHub *netlink.Handle, _ netns.NsHandle) error {
			master, err := inHub.LinkByName(bridge)
			if err != nil {
				return fmt.Errorf("find bridge: %w", err)
			}
			attributes := netlink.NewLinkAttrs()
			attributes.Name = port
			attributes.MasterIndex = master.Attrs().Index
			attributes.Flags = net.FlagUp
			cable := &netlink.Veth{LinkAttrs: attributes, PeerName: "eth0", PeerNamespace: netlink.NsFd(nodeNS)}
			if err := inHub.LinkAdd(cable); err != nil {
				return fmt.Errorf("make cable: %w", err)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err := up(inNode, "eth0", address); err != nil {
			return err
		}
		if err := inNode.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()}); err != nil {
			return fmt.Errorf("set default route: %w", err)
		}
		return nil
	})
}

func loopback(handle *netlink.Handle) error {
	link, err := handle.LinkByName("lo")
	if err == nil {
		err = handle.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set up loopback: %w", err)
	}
	return nil
}

func up(handle *netlink.Handle, name string, address netip.Prefix) error {
	link, err := handle.LinkByName(name)
	if err == nil {
		err = handle.AddrAdd(link, &netlink.Addr{IPNet: ipNet(address)})
	}
	if err == nil {
		err = handle.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set up %s: %w", name, err)
	}
	return nil
}

func ipNet(prefix netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
}

// Route makes packets for the prefix leave the machine towards the gateway.
func (m Machine) Route(prefix netip.Prefix, gateway netip.Addr) error {
	pid, err := m.InitPID()
	if err != nil {
		return err
	}
	return within(pid, func(handle *netlink.Handle, _ netns.NsHandle) error {
		if err := handle.RouteReplace(&netlink.Route{Dst: ipNet(prefix), Gw: gateway.AsSlice()}); err != nil {
			return fmt.Errorf("set route to %s: %w", prefix, err)
		}
		return nil
	})
}

// SetPort plugs or unplugs a machine's cable at the hub.
func (m Machine) SetPort(port string, on bool) error {
	return m.withPort(port, func(handle *netlink.Handle, link netlink.Link) error {
		if on {
			return handle.LinkSetUp(link)
		}
		return handle.LinkSetDown(link)
	})
}

// Isolate cuts a port off from all other isolated ports, but neither from the hub nor from ports that are not isolated. Isolating
// two ports separates exactly these two machines.
func (m Machine) Isolate(port string, on bool) error {
	return m.withPort(port, func(handle *netlink.Handle, link netlink.Link) error {
		return handle.LinkSetIsolated(link, on)
	})
}

func (m Machine) withPort(port string, do func(*netlink.Handle, netlink.Link) error) error {
	pid, err := m.InitPID()
	if err != nil {
		return err
	}
	return within(pid, func(handle *netlink.Handle, _ netns.NsHandle) error {
		link, err := handle.LinkByName(port)
		if err != nil {
			return fmt.Errorf("find port %s: %w", port, err)
		}
		if err := do(handle, link); err != nil {
			return fmt.Errorf("switch port %s: %w", port, err)
		}
		return nil
	})
}

// Dial connects from inside the machine's network namespace. The address must be numeric.
func (m Machine) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from %s: %w", m.Name, err)
	}
	return socket(m, func() (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, network, address)
	})
}

// ListenPacket listens inside the machine's network namespace, as net.ListenPacket does. The address must be numeric.
func (m Machine) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", m.Name, err)
	}
	return socket(m, func() (net.PacketConn, error) {
		var config net.ListenConfig
		return config.ListenPacket(ctx, network, address)
	})
}

// socket calls a function that makes a socket inside a machine's network namespace.
func socket[T interface {
	comparable
	io.Closer
}](m Machine, open func() (T, error)) (T, error) {
	var none T
	pid, err := m.InitPID()
	if err != nil {
		return none, err
	}
	type result struct {
		socket T
		err    error
	}
	results := make(chan result, 1)
	go func() {
		// A socket belongs to the namespace of the thread that makes it. When the way back fails, the thread stays locked
		// and ends with this goroutine.
		runtime.LockOSThread()
		socket, back, err := openAt(pid, open)
		if back == nil {
			runtime.UnlockOSThread()
		}
		results <- result{socket, errors.Join(err, back)}
	}()
	r := <-results
	if r.err != nil {
		if r.socket != none {
			r.socket.Close()
		}
		return none, r.err
	}
	return r.socket, nil
}

func openAt[T any](pid int, open func() (T, error)) (socket T, back, err error) {
	home, err := netns.Get()
	if err != nil {
		return socket, nil, fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	away, err := netns.GetFromPid(pid)
	if err != nil {
		return socket, nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer away.Close()
	if err := netns.Set(away); err != nil {
		return socket, nil, fmt.Errorf("enter network namespace: %w", err)
	}
	socket, err = open()
	return socket, netns.Set(home), err
}
