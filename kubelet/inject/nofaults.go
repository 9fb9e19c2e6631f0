//go:build podmig_patched && !podmig_faults

package inject

import "podmig.dev/podmig/kubelet/migration"

// faultPoint is set in kubelets for tests only; see faults.go.
var faultPoint func(name string)

// deadlines are the engine's own.
func deadlines() (migration.Deadlines, error) { return migration.Deadlines{}, nil }
