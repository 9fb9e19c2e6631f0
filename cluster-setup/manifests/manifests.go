// Package manifests carries the Kubernetes objects and policies that a cluster with pod migration needs, as files that an
// operator can also apply by hand.
package manifests

import (
	"bytes"
	"embed"
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

//go:embed crds controller.yaml
var controller embed.FS

// Controller has the custom resource definitions, which have to be there first, and the
// controller of PodMigration objects.
func Controller() (definitions, objects []byte, err error) {
	entries, err := controller.ReadDir("crds")
	if err != nil {
		return nil, nil, err
	}
	var all [][]byte
	for _, e := range entries {
		text, err := controller.ReadFile("crds/" + e.Name())
		if err != nil {
			return nil, nil, err
		}
		all = append(all, text)
	}
	objects, err = controller.ReadFile("controller.yaml")
	return bytes.Join(all, []byte("\n---\n")), objects, err
}

//go:embed dns.yaml
var dns string

// DNS runs the cluster's name server under the given service address.
func DNS(address, domain string) []byte {
	return []byte(strings.NewReplacer("ADDRESS", address, "DOMAIN", domain).Replace(dns))
}
