// Package tree turns directories of a node into entries of a checkpoint stream and
// back: writable layers, volumes, /dev/shm.
//
// Ownership, modes, times, extended attributes, holes, hard links, sockets, FIFOs
// and whiteouts survive. Device nodes do not: a checkpoint never creates a device.
// Sending reads a tree that nobody writes, because its containers are frozen.
// Receiving believes nothing: every path is resolved below the root without
// following a link, so a checkpoint can not write outside the directory it was
// given. Nothing here knows which directories those are.
package tree
