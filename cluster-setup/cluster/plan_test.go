package cluster

import (
	"net/netip"
	"testing"
)

func TestPlanNodesDoNotOverlap(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	for number := 1; number <= MaxNodes; number++ {
		p, err := planNode(number)
		if err != nil {
			t.Fatal(err)
		}
		if !nodeNetwork.Contains(p.address) || p.address == hubAddress {
			t.Errorf("node %d: address %s is not one of a node", number, p.address)
		}
		if !podNetwork.Contains(p.pods.Addr()) || p.pods != p.pods.Masked() {
			t.Errorf("node %d: pods %s are outside of %s", number, p.pods, podNetwork)
		}
		if len(p.port) > 15 {
			t.Errorf("node %d: %s is too long for an interface", number, p.port)
		}
		for _, value := range []string{p.name, p.address.String(), p.pods.String(), p.port} {
			if other := seen[value]; other != 0 {
				t.Errorf("nodes %d and %d share %s", other, number, value)
			}
			seen[value] = number
		}
	}
}

func TestPlanNodeRefusesOtherNumbers(t *testing.T) {
	t.Parallel()
	for _, number := range []int{-1, 0, MaxNodes + 1} {
		if _, err := planNode(number); err == nil {
			t.Errorf("node %d was planned", number)
		}
	}
}

func TestNetworksAreApart(t *testing.T) {
	t.Parallel()
	networks := []netip.Prefix{nodeNetwork, podNetwork, serviceNetwork}
	for i, one := range networks {
		for _, other := range networks[i+1:] {
			if one.Overlaps(other) {
				t.Errorf("%s and %s overlap", one, other)
			}
		}
	}
	for _, address := range []netip.Addr{apiService, dnsService} {
		if !serviceNetwork.Contains(address) {
			t.Errorf("%s is no service address", address)
		}
	}
}

func TestCheckName(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		valid bool
	}{
		{"podmig", true}, {"a", true}, {"e2e-2", true},
		{"", false}, {"..", false}, {"a/b", false}, {"-a", false}, {"A", false}, {"a-", false},
		{"abcdefghijklmnopqrstuvwxyz0123456789", false},
	} {
		if err := checkName(test.name); (err == nil) != test.valid {
			t.Errorf("%q: %v, valid should be %t", test.name, err, test.valid)
		}
	}
}

func TestGateFlag(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		gates map[string]bool
		want  string
	}{
		{"none", nil, ""},
		{"sorted", map[string]bool{"B": false, "A": true}, "--feature-gates=A=true,B=false"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := ""
			if flag := gateFlag(test.gates); flag != nil {
				got = flag[0]
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestIsReady(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, object string
		ready        bool
	}{
		{"ready", `{"status":{"conditions":[{"type":"MemoryPressure","status":"False"},{"type":"Ready","status":"True"}]}}`, true},
		{"not ready", `{"status":{"conditions":[{"type":"Ready","status":"False","message":"no network"}]}}`, false},
		{"silent", `{"status":{}}`, false},
		{"nonsense", `[`, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if err := isReady([]byte(test.object)); (err == nil) != test.ready {
				t.Errorf("got %v, ready should be %t", err, test.ready)
			}
		})
	}
}

func TestClustersOfOneNameInTwoFoldersHaveTheirOwnControlGroups(t *testing.T) {
	a, b := cgroupOf("e2e", "/src/a/.build/cluster/e2e"), cgroupOf("e2e", "/src/b/.build/cluster/e2e")
	if a == b {
		t.Errorf("both are in %s", a)
	}
	if again := cgroupOf("e2e", "/src/a/.build/cluster/e2e"); again != a {
		t.Errorf("first %s, then %s", a, again)
	}
}
