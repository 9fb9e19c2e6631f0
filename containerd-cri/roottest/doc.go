// Package roottest runs the migration service inside a real containerd, with runc
// and CRIU, as root.
//
// Its test binary makes itself a node first: namespaces of its own, the user land
// of the node image, a control group below the caller's, and a containerd in it.
// Nothing outside is touched, and everything ends with the test. The tests prove
// what only the real parts can: that processes survive, that nothing is left
// behind, that memory stays bounded. They do not cover two machines, the kubelet or
// the network between nodes; that is the cluster's end-to-end test.
//
// Everything has the build tag root. PODMIG_ROOTFS, PODMIG_BIN and PODMIG_IMAGES
// name the node image's root file system, the built programs and the container
// images; the defaults are where make image puts them.
package roottest
