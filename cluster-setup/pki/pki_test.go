package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
)

func newTestCA(t *testing.T) *CA {
	t.Helper()
	ca, err := NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func parseCert(t *testing.T, data []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(data)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestIssuedCertificatesVerify(t *testing.T) {
	t.Parallel()
	ca := newTestCA(t)
	other := newTestCA(t)
	for _, test := range []struct {
		name    string
		request Request
		signer  *CA
		usage   x509.ExtKeyUsage
		host    string
		valid   bool
	}{
		{"client", Request{CommonName: "c", Groups: []string{"g"}, Client: true}, ca, x509.ExtKeyUsageClientAuth, "", true},
		{"client is no server", Request{CommonName: "c", Client: true}, ca, x509.ExtKeyUsageServerAuth, "", false},
		{"server by name", Request{CommonName: "s", Server: true, DNSNames: []string{"node1"}}, ca, x509.ExtKeyUsageServerAuth, "node1", true},
		{"server by address", Request{CommonName: "s", Server: true, IPs: []net.IP{net.IPv4(10, 89, 0, 11)}}, ca, x509.ExtKeyUsageServerAuth, "10.89.0.11", true},
		{"server under another name", Request{CommonName: "s", Server: true, DNSNames: []string{"node1"}}, ca, x509.ExtKeyUsageServerAuth, "node2", false},
		{"foreign authority", Request{CommonName: "c", Client: true}, other, x509.ExtKeyUsageClientAuth, "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			pair, err := test.signer.Issue(test.request)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tls.X509KeyPair(pair.Cert, pair.Key); err != nil {
				t.Fatalf("key does not belong to certificate: %v", err)
			}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(ca.Cert)
			_, err = parseCert(t, pair.Cert).Verify(x509.VerifyOptions{Roots: roots, DNSName: test.host, KeyUsages: []x509.ExtKeyUsage{test.usage}})
			if (err == nil) != test.valid {
				t.Errorf("verify: %v, valid should be %t", err, test.valid)
			}
		})
	}
}

func TestIssueRefusesUselessCertificates(t *testing.T) {
	t.Parallel()
	if _, err := newTestCA(t).Issue(Request{CommonName: "nobody"}); err == nil {
		t.Error("a certificate without a use was issued")
	}
}

func TestLoadedAuthorityStillSigns(t *testing.T) {
	t.Parallel()
	ca := newTestCA(t)
	loaded, err := LoadCA(ca.Pair)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := loaded.Issue(Request{CommonName: "late", Client: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := parseCert(t, pair.Cert).CheckSignatureFrom(parseCert(t, ca.Cert)); err != nil {
		t.Error(err)
	}
	if _, err := LoadCA(Pair{}); err == nil {
		t.Error("an empty authority was loaded")
	}
}

func TestKubeconfigIsReadByClients(t *testing.T) {
	t.Parallel()
	ca := newTestCA(t)
	pair, err := ca.Issue(Request{CommonName: "system:node:node1", Groups: []string{"system:nodes"}, Client: true})
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(Kubeconfig("test", "https://10.89.0.1:6443", ca.Cert, "system:node:node1", pair))
	if err != nil {
		t.Fatal(err)
	}
	if config.Host != "https://10.89.0.1:6443" || config.Insecure || string(config.CAData) != string(ca.Cert) || string(config.KeyData) != string(pair.Key) {
		t.Errorf("unexpected client configuration %v", config)
	}
}
