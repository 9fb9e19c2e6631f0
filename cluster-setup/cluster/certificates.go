package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"podmig.dev/podmig/cluster-setup/pki"
)

// authorities of a cluster. Clients and servers of Kubernetes share one, which is what lets two kubelets verify each other; etcd
// and the aggregation layer have their own, because whoever holds one of their certificates needs no further permission.
var authorities = []string{"ca", "etcd-ca", "front-proxy-ca"}

func (c *Cluster) pkiPath(name string) string { return filepath.Join(c.dir, "pki", name) }

func (c *Cluster) writePair(name string, pair pki.Pair) error {
	return errors.Join(
		writeFile(c.pkiPath(name+".crt"), pair.Cert, 0o644),
		writeFile(c.pkiPath(name+".key"), pair.Key, 0o600),
	)
}

func (c *Cluster) loadCA(name string) (*pki.CA, error) {
	cert, err := os.ReadFile(c.pkiPath(name + ".crt"))
	if err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	key, err := os.ReadFile(c.pkiPath(name + ".key"))
	if err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	return pki.LoadCA(pki.Pair{Cert: cert, Key: key})
}

// makeCertificates makes all that the control plane needs.
func (c *Cluster) makeCertificates() error {
	cas := map[string]*pki.CA{}
	for _, name := range authorities {
		ca, err := pki.NewCA("podmig-" + c.state.Name + "-" + name)
		if err != nil {
			return err
		}
		if err := c.writePair(name, ca.Pair); err != nil {
			return err
		}
		cas[name] = ca
	}
	local := []net.IP{net.IPv4(127, 0, 0, 1)}
	for _, entry := range []struct {
		name, ca string
		request  pki.Request
	}{
		{"apiserver", "ca", pki.Request{
			CommonName: "kube-apiserver", Server: true,
			DNSNames: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + domain},
			IPs:      append([]net.IP{toIP(hubAddress), toIP(apiService)}, local...),
		}},
		{"apiserver-kubelet-client", "ca", pki.Request{CommonName: kubeletClient, Client: true}},
		{"apiserver-etcd-client", "etcd-ca", pki.Request{CommonName: "kube-apiserver-etcd-client", Client: true}},
		{"front-proxy-client", "front-proxy-ca", pki.Request{CommonName: "front-proxy-client", Client: true}},
		{"etcd", "etcd-ca", pki.Request{CommonName: "etcd", Server: true, Client: true, DNSNames: []string{"localhost"}, IPs: local}},
	} {
		pair, err := cas[entry.ca].Issue(entry.request)
		if err != nil {
			return err
		}
		if err := c.writePair(entry.name, pair); err != nil {
			return err
		}
	}
	key, err := pki.ServiceAccountKey()
	if err != nil {
		return err
	}
	if err := errors.Join(writeFile(c.pkiPath("sa.pub"), key.Cert, 0o644), writeFile(c.pkiPath("sa.key"), key.Key, 0o600)); err != nil {
		return err
	}
	for file, request := range map[string]pki.Request{
		"admin.conf":              {CommonName: "kubernetes-admin", Groups: []string{"system:masters"}, Client: true},
		"controller-manager.conf": {CommonName: "system:kube-controller-manager", Client: true},
		"scheduler.conf":          {CommonName: "system:kube-scheduler", Client: true},
	} {
		if err := c.writeKubeconfig(cas["ca"], filepath.Join(c.dir, file), request); err != nil {
			return err
		}
	}
	return nil
}

// kubeletClient is the name under which the API server calls kubelets; the manifests bind it to the role that needs.
const kubeletClient = "kube-apiserver-kubelet-client"

func (c *Cluster) writeKubeconfig(ca *pki.CA, path string, request pki.Request) error {
	pair, err := ca.Issue(request)
	if err != nil {
		return err
	}
	return writeFile(path, pki.Kubeconfig(c.state.Name, apiURL(), ca.Cert, request.CommonName, pair), 0o600)
}

// makeNodeCertificates puts a node's identity into its file tree.
func (c *Cluster) makeNodeCertificates(p plan, upper string) error {
	ca, err := c.loadCA("ca")
	if err != nil {
		return err
	}
	serving, err := ca.Issue(pki.Request{
		CommonName: "system:node:" + p.name, Groups: []string{"system:nodes"}, Server: true,
		DNSNames: []string{p.name}, IPs: []net.IP{toIP(p.address)},
	})
	if err != nil {
		return err
	}
	etc := filepath.Join(upper, "etc/kubernetes")
	return errors.Join(
		writeFile(filepath.Join(etc, "pki/ca.crt"), ca.Cert, 0o644),
		writeFile(filepath.Join(etc, "pki/kubelet.crt"), serving.Cert, 0o644),
		writeFile(filepath.Join(etc, "pki/kubelet.key"), serving.Key, 0o600),
		c.writeKubeconfig(ca, filepath.Join(etc, "kubelet.conf"), nodeIdentity(p.name)),
		c.writeKubeconfig(ca, filepath.Join(etc, "kube-proxy.conf"), pki.Request{CommonName: "system:kube-proxy", Client: true}),
	)
}

// nodeIdentity is what the Node authorizer and other kubelets know a kubelet by.
func nodeIdentity(node string) pki.Request {
	return pki.Request{CommonName: "system:node:" + node, Groups: []string{"system:nodes"}, Client: true}
}

func toIP(address netip.Addr) net.IP { return net.IP(address.AsSlice()) }

func writeFile(path string, content []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	if err := os.WriteFile(path, content, mode); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}
