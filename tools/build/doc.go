// Package build compiles every binary that a podmig cluster needs into .build/bin.
//
// It knows which programs there are, how each is linked and which version it reports, and it skips everything whose
// inputs have not changed. It leaves compiling and caching of packages to the Go tool and patching to package patchq.
package build
