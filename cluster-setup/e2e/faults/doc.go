// Package faults breaks migrations on a real cluster at points that it chooses: it
// kills daemons, cuts cables, fills disks, deletes pods, and looks what becomes of
// the pod.
//
// The nodes run a kubelet that stops before any effect of the migration engine that
// has a FIFO in /run/podmig-faults; see kubelet/inject. So every fault hits the same
// step in every run, however busy the machine is.
//
// The pod that moves counts, and sends every number to an address that each node has
// for itself. This test listens there on both nodes, so no cut cable hides a number,
// and two running copies would show at once: both know the same next number. After
// each fault exactly one copy goes on where the count stood, the clone's condition
// tells how it ended, and the nodes have the mounts, control groups, processes, files
// and network interfaces that they had before.
//
// What a fault in the kernel does, or one of a machine as a whole, is not shown here.
package faults
