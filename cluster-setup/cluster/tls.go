package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"podmig.dev/podmig/cluster-setup/pki"
)

// adminTLS is the configuration of an administrator's connection.
func adminTLS(ca *pki.CA) (*tls.Config, error) {
	pair, err := ca.Issue(pki.Request{CommonName: "kubernetes-admin", Groups: []string{"system:masters"}, Client: true})
	if err != nil {
		return nil, err
	}
	certificate, err := tls.X509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		return nil, fmt.Errorf("load client certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca.Cert) {
		return nil, errors.New("load authority: it is not PEM")
	}
	return &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: roots, MinVersion: tls.VersionTLS13}, nil
}
