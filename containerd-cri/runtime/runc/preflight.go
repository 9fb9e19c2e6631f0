package runc

import (
	"context"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// Preflight implements runtime.Runtime.
func (r *Runtime) Preflight(ctx context.Context, cs []runtime.Container) (runtime.Report, error) {
	return runtime.Report{}, nil
}
