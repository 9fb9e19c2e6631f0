// Package e2e moves real pods between the nodes of a real cluster: API server, etcd,
// kubelets, containerd, runc and CRIU, with the applications that users run.
//
// The tests need root and the built binaries and images; `make e2e` provides them.
// One cluster of two nodes serves all tests, each in a namespace of its own; every
// test ends with a look for leftovers on both nodes. With PODMIG_E2E_CLUSTER set to
// the folder of a running cluster the tests use that one and leave it running.
//
// They show that all parts work together on one machine, where the two nodes share a
// kernel. They cannot show two kernels, two CPUs or a real network between them.
package e2e
