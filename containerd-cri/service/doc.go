// Package service implements the migration extension of the CRI over small ports:
// the containers of the CRI service, a runtime that freezes and dumps, and a place
// for files in memory.
//
// A session is one migration seen from one side. What the runtime must still know
// after a restart (which containers are frozen, which checkpoint has been verified)
// is written to the session's directory before it becomes true. Sessions end with
// their Finish call; those whose containers are gone, or that nobody connected to,
// are collected.
//
// The conformance suite of cri-api/migration/migrationtest runs against this
// package over the fake runtime without root, and over runc and CRIU with the build
// tag root, which is the only proof for freezing, dumping and restoring.
package service
