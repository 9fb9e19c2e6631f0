// Package patchq keeps the queue of patches that podmig carries on top of its upstreams.
//
// It assembles patched source trees below .build/src from the Go module cache (whose contents go.sum pins),
// writes the module file that makes the Go tool build from them, runs upstream's own code generators where a
// patched type needs it, checks the queue, and offers the edit loop (open, save). It does not compile anything
// and it never looks at the git repository it is called in: all git commands run in scratch folders with a
// configuration of their own, so that a developer's settings cannot change a patch.
package patchq
