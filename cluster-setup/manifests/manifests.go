// Package manifests carries the Kubernetes objects and policies that a cluster with pod migration needs, as files that an
// operator can also apply by hand.
package manifests

import (
	_ "embed"
	"strings"
)

// RBAC gives the API server its rights on kubelets and nodes theirs on each other's migration endpoint.
//
//go:embed rbac.yaml
var RBAC []byte

// AuditPolicy writes one line of metadata per request.
//
//go:embed audit-policy.yaml
var AuditPolicy []byte

//go:embed dns.yaml
var dns string

// DNS runs the cluster's name server under the given service address.
func DNS(address, domain string) []byte {
	return []byte(strings.NewReplacer("ADDRESS", address, "DOMAIN", domain).Replace(dns))
}
