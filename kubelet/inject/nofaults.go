//go:build podmig_patched && !podmig_faults

package inject

// faultPoint is set in kubelets for tests only; see faults.go.
var faultPoint func(name string)
