// Package runc implements the runtime port with the freezer of the kernel, runc
// and CRIU.
//
// The containers are frozen by this package, through their control groups, before
// CRIU sees them and until after it has gone: whatever CRIU does when it fails, the
// processes do not run. runc is called beside the shim; it works on the state that
// the shim's runc has written, and leaves it alone.
//
// What the tests here prove without root: parsing and the decisions of the
// preflight, on recorded /proc contents. Freezing and dumping for real is tested
// by the service's tests with the build tag root.
package runc
