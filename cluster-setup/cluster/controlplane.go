package cluster

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"podmig.dev/podmig/cluster-setup/manifests"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// migrationGate is the gate of the patched components.
const migrationGate = "PodMigration"

// gates returns the feature gates of one binary. An unknown gate would stop it, so the migration gate is added only to what
// says by its version that it knows it.
func (c *Cluster) gates(ctx context.Context, binary string) (map[string]bool, error) {
	gates := maps.Clone(c.state.FeatureGates)
	if gates == nil {
		gates = map[string]bool{}
	}
	if _, named := gates[migrationGate]; named {
		return gates, nil
	}
	version, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	if strings.Contains(string(version), "+podmig") {
		gates[migrationGate] = true
	}
	return gates, nil
}

// gateFlag renders the gates as a flag, or nothing when there are none.
func gateFlag(gates map[string]bool) []string {
	var parts []string
	for _, gate := range slices.Sorted(maps.Keys(gates)) {
		parts = append(parts, fmt.Sprintf("%s=%t", gate, gates[gate]))
	}
	if len(parts) == 0 {
		return nil
	}
	return []string{"--feature-gates=" + strings.Join(parts, ",")}
}

func (c *Cluster) startHub(ctx context.Context) error {
	components, err := c.controlPlane(ctx)
	if err != nil {
		return err
	}
	spec := netns.Spec{
		Name: hubName, Dir: c.machineDir(hubName), Cgroup: c.cgroupOf(hubName), Layout: c.layout,
		Supervision: components,
	}
	_, err = netns.Start(ctx, spec, func(pid int) error {
		return netns.ConnectHub(pid, netip.PrefixFrom(hubAddress, nodeNetwork.Bits()))
	})
	return err
}

func (c *Cluster) controlPlane(ctx context.Context) ([]supervisor.Component, error) {
	dir := c.machineDir(hubName)
	data := filepath.Join(dir, "disk")
	crt := func(name string) string { return c.pkiPath(name + ".crt") }
	key := func(name string) string { return c.pkiPath(name + ".key") }
	controllers, scheduler := filepath.Join(c.dir, "controller-manager.conf"), filepath.Join(c.dir, "scheduler.conf")
	api := []string{
		"--advertise-address=" + hubAddress.String(),
		fmt.Sprintf("--secure-port=%d", apiPort),
		"--etcd-servers=https://127.0.0.1:2379",
		"--etcd-cafile=" + crt("etcd-ca"),
		"--etcd-certfile=" + crt("apiserver-etcd-client"),
		"--etcd-keyfile=" + key("apiserver-etcd-client"),
		"--client-ca-file=" + crt("ca"),
		"--tls-cert-file=" + crt("apiserver"),
		"--tls-private-key-file=" + key("apiserver"),
		"--kubelet-client-certificate=" + crt("apiserver-kubelet-client"),
		"--kubelet-client-key=" + key("apiserver-kubelet-client"),
		"--kubelet-certificate-authority=" + crt("ca"),
		"--kubelet-preferred-address-types=InternalIP",
		"--anonymous-auth=false",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=https://kubernetes.default.svc." + domain,
		"--service-account-key-file=" + c.pkiPath("sa.pub"),
		"--service-account-signing-key-file=" + c.pkiPath("sa.key"),
		"--service-cluster-ip-range=" + serviceNetwork.String(),
		"--requestheader-client-ca-file=" + crt("front-proxy-ca"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + crt("front-proxy-client"),
		"--proxy-client-key-file=" + key("front-proxy-client"),
		// The control plane has no kube-proxy: it reaches services by their endpoints.
		"--enable-aggregator-routing=true",
		"--profiling=false",
	}
	if c.state.Audit {
		policy := filepath.Join(c.dir, "audit-policy.yaml")
		if err := writeFile(policy, manifests.AuditPolicy, 0o644); err != nil {
			return nil, err
		}
		api = append(api, "--audit-policy-file="+policy, "--audit-log-path="+filepath.Join(dir, "logs", "audit.log"))
	}
	all := []struct {
		name, waitFor string
		gated         bool
		args          []string
	}{
		{"etcd", "", false, []string{
			"--name=hub",
			"--data-dir=" + filepath.Join(data, "etcd"),
			"--listen-client-urls=https://127.0.0.1:2379",
			"--advertise-client-urls=https://127.0.0.1:2379",
			"--listen-peer-urls=https://127.0.0.1:2380",
			"--initial-advertise-peer-urls=https://127.0.0.1:2380",
			"--initial-cluster=hub=https://127.0.0.1:2380",
			"--client-cert-auth", "--trusted-ca-file=" + crt("etcd-ca"), "--cert-file=" + crt("etcd"), "--key-file=" + key("etcd"),
			"--peer-client-cert-auth", "--peer-trusted-ca-file=" + crt("etcd-ca"), "--peer-cert-file=" + crt("etcd"), "--peer-key-file=" + key("etcd"),
			// The data does not outlive the machine anyway.
			"--unsafe-no-fsync",
			"--log-level=warn",
		}},
		{"kube-apiserver", "tcp:127.0.0.1:2379", true, api},
		{"kube-controller-manager", "tcp:" + APIServer.String(), true, []string{
			"--kubeconfig=" + controllers, "--authentication-kubeconfig=" + controllers, "--authorization-kubeconfig=" + controllers,
			"--client-ca-file=" + crt("ca"), "--requestheader-client-ca-file=" + crt("front-proxy-ca"),
			"--bind-address=127.0.0.1",
			"--root-ca-file=" + crt("ca"),
			"--service-account-private-key-file=" + c.pkiPath("sa.key"),
			"--use-service-account-credentials=true",
			"--cluster-cidr=" + podNetwork.String(),
			"--allocate-node-cidrs=false",
			"--leader-elect=false",
			"--profiling=false",
		}},
		{"kube-scheduler", "tcp:" + APIServer.String(), true, []string{
			"--kubeconfig=" + scheduler, "--authentication-kubeconfig=" + scheduler, "--authorization-kubeconfig=" + scheduler,
			"--client-ca-file=" + crt("ca"), "--requestheader-client-ca-file=" + crt("front-proxy-ca"),
			"--bind-address=127.0.0.1",
			"--leader-elect=false",
			"--profiling=false",
		}},
	}
	var components []supervisor.Component
	for _, one := range all {
		binary := filepath.Join(c.state.Bin, one.name)
		args := append([]string{binary}, one.args...)
		if one.gated {
			gates, err := c.gates(ctx, binary)
			if err != nil {
				return nil, err
			}
			args = append(args, gateFlag(gates)...)
		}
		components = append(components, supervisor.Component{
			Name: one.name, Args: args, Log: filepath.Join(dir, "logs", one.name+".log"), WaitFor: one.waitFor,
		})
	}
	return components, nil
}
