// Package cluster brings Kubernetes clusters up and down on one machine: a control plane, any number of nodes, verified
// connections between all of them.
//
// Up is a visible list of named actions; everything it makes hangs on a folder and on control groups whose names follow from the
// cluster's, so Down needs no record of how far an earlier Up came. The binaries are files in a folder: patched or not, this
// package does not care. It replaces neither kubeadm nor a production set-up; there is one control plane and no upgrade.
package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
)

// Addresses. Every cluster has the same ones: each lives in network namespaces of its own and never meets another.
var (
	nodeNetwork    = netip.MustParsePrefix("10.89.0.0/24")
	podNetwork     = netip.MustParsePrefix("10.90.0.0/16")
	serviceNetwork = netip.MustParsePrefix("10.91.0.0/16")
	hubAddress     = netip.MustParseAddr("10.89.0.1")
	apiService     = netip.MustParseAddr("10.91.0.1")
	dnsService     = netip.MustParseAddr("10.91.0.10")
)

const (
	apiPort = 6443
	// firstHost is the last byte of node 1's address minus one.
	firstHost = 10
	// MaxNodes is what the address plan holds; a machine gives out earlier.
	MaxNodes = 200
	domain   = "cluster.local"
)

// APIServer is the address of the API server inside every cluster.
var APIServer = netip.AddrPortFrom(hubAddress, apiPort)

func apiURL() string { return "https://" + APIServer.String() }

// plan is what follows from a node's number.
type plan struct {
	name    string
	address netip.Addr
	pods    netip.Prefix
	port    string // The hub's end of the node's cable.
}

func planNode(number int) (plan, error) {
	if number < 1 || number > MaxNodes {
		return plan{}, fmt.Errorf("node number %d is not between 1 and %d", number, MaxNodes)
	}
	base := nodeNetwork.Addr().As4()
	base[3] = byte(firstHost + number)
	pods := podNetwork.Addr().As4()
	pods[2] = byte(number)
	return plan{
		name:    fmt.Sprintf("node%d", number),
		address: netip.AddrFrom4(base),
		pods:    netip.PrefixFrom(netip.AddrFrom4(pods), 24),
		port:    fmt.Sprintf("port%d", number),
	}, nil
}

// hubName names the machine of the control plane.
const hubName = "hub"

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("cluster name %q: use at most 32 lower case letters, digits and dashes", name)
	}
	return nil
}

// cgroupParent holds the control groups of all clusters of the machine.
const cgroupParent = "/podmig"

// cgroupOf names the control group of a cluster after its folder, too: clusters of one name in two checkouts must not end each
// other. dir is absolute.
func cgroupOf(cluster, dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(cgroupParent, cluster+"-"+hex.EncodeToString(sum[:4]))
}

func (c *Cluster) cgroupOf(machine string) string {
	return filepath.Join(cgroupOf(c.state.Name, c.dir), machine)
}
