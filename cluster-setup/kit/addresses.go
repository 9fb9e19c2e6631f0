package kit

import (
	"context"
	"net"
	"path/filepath"
	"strconv"
	"time"
)

// NewAddresses calls f with each address that the node gives to a pod from now on.
// The address of a clone is known to the API server only after the clone runs; the
// node's address management knows it as soon as its sandbox exists. It returns nil when ctx ends.
func (k *Kit) NewAddresses(ctx context.Context, node string, f func(ip string) error) error {
	m, err := k.Cluster.Machine(node)
	if err != nil {
		return err
	}
	pid, err := m.InitPID()
	if err != nil {
		return err
	}
	pattern := filepath.Join("/proc", strconv.Itoa(pid), "root/var/lib/cni/networks/*/*")
	known := make(map[string]bool)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for first := true; ; first = false {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, file := range files {
			ip := filepath.Base(file)
			if known[ip] || net.ParseIP(ip) == nil {
				continue
			}
			known[ip] = true
			if first {
				continue
			}
			if err := f(ip); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
