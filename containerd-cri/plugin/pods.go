package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/service"
)

// pods implements service.Pods over the CRI service of this process.
type pods struct {
	cri cri.RuntimeServiceServer
	// initialized tells whether the CRI service knows its pods yet: before that it
	// takes every pod for one that is gone.
	initialized func() bool
}

var _ service.Pods = (*pods)(nil)

func call[Q, R any](ctx context.Context, p *pods, f func(context.Context, Q) (R, error), q Q) (R, error) {
	if !p.initialized() {
		var none R
		return none, fmt.Errorf("the CRI service has not started yet: %w", errdefs.ErrUnavailable)
	}
	return f(namespaces.WithNamespace(ctx, namespace), q)
}

// PodSandboxStatus implements service.Pods.
func (p *pods) PodSandboxStatus(ctx context.Context, q *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	return call(ctx, p, p.cri.PodSandboxStatus, q)
}

// RunPodSandbox implements service.Pods.
func (p *pods) RunPodSandbox(ctx context.Context, q *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	return call(ctx, p, p.cri.RunPodSandbox, q)
}

// StopPodSandbox implements service.Pods.
func (p *pods) StopPodSandbox(ctx context.Context, q *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	return call(ctx, p, p.cri.StopPodSandbox, q)
}

// RemovePodSandbox implements service.Pods.
func (p *pods) RemovePodSandbox(ctx context.Context, q *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	return call(ctx, p, p.cri.RemovePodSandbox, q)
}

// CreateContainer implements service.Pods.
func (p *pods) CreateContainer(ctx context.Context, q *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	return call(ctx, p, p.cri.CreateContainer, q)
}
