// Package apitest asks the patched API server what spec.clonePod means to it.
//
// Its tests (build tag podmig_patched, after `make build`) start etcd and kube-apiserver from .build/bin on loopback
// and talk to them as administrators, ordinary users, old clients and nodes. They prove that the patches below
// patches/kubernetes work together in the program that is shipped: gate, field, validation, admission, authorisation
// of nodes, storage. They need no root and run no pod, so they say nothing about what kubelets make of a clone.
package apitest
