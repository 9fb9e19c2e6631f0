//go:build podmig_patched

package plugin

import (
	"context"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	criplugin "github.com/containerd/containerd/v2/plugins/cri"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/service"
)

const patched = true

type startKey struct{}

type start struct {
	id string
	service.Restore
}

// served is what containerd's CRI plugin serves.
var served runtimeService

func init() {
	criplugin.WrapRuntimeService = func(s cri.RuntimeServiceServer) cri.RuntimeServiceServer {
		served.RuntimeServiceServer = s
		return &served
	}
	containerd.StartTaskOpts = func(ctx context.Context, id string) []containerd.NewTaskOpts {
		s, ok := ctx.Value(startKey{}).(start)
		if !ok || s.id != id {
			return nil
		}
		return []containerd.NewTaskOpts{containerd.WithRestoreImagePath(s.Images), containerd.WithRestoreWorkPath(s.Work)}
	}
	containerd.StartedAt = func(ctx context.Context, id string) time.Time {
		if s, ok := ctx.Value(startKey{}).(start); ok && s.id == id {
			return s.StartedAt
		}
		return time.Now()
	}
}

// servePods begins to serve the CRI's calls about checkpoints of pods.
func servePods(s *service.Service) { served.migration.Store(s) }

// runtimeService is containerd's CRI service with the calls that it does not implement.
type runtimeService struct {
	cri.RuntimeServiceServer
	// migration is set before the first call comes.
	migration atomic.Pointer[service.Service]
}

// CheckpointPod implements cri.RuntimeServiceServer.
func (r *runtimeService) CheckpointPod(ctx context.Context, q *cri.CheckpointPodRequest) (*cri.CheckpointPodResponse, error) {
	if s := r.migration.Load(); s != nil {
		return s.CheckpointPod(ctx, q)
	}
	return r.RuntimeServiceServer.CheckpointPod(ctx, q)
}

// RestorePod implements cri.RuntimeServiceServer.
func (r *runtimeService) RestorePod(ctx context.Context, q *cri.RestorePodRequest) (*cri.RestorePodResponse, error) {
	if s := r.migration.Load(); s != nil {
		return s.RestorePod(ctx, q)
	}
	return r.RuntimeServiceServer.RestorePod(ctx, q)
}

// StartContainer implements cri.RuntimeServiceServer. A container that RestorePod has
// created is resumed; the service then calls back with a context that says from what.
func (r *runtimeService) StartContainer(ctx context.Context, q *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	if _, resuming := ctx.Value(startKey{}).(start); !resuming {
		if s := r.migration.Load(); s != nil {
			if prepared, err := s.StartContainer(ctx, q.GetContainerId()); prepared {
				return &cri.StartContainerResponse{}, err
			}
		}
	}
	return r.RuntimeServiceServer.StartContainer(ctx, q)
}

// startFrom returns the context with which StartContainer restores the container.
func startFrom(ctx context.Context, id string, r service.Restore) context.Context {
	return context.WithValue(ctx, startKey{}, start{id: id, Restore: r})
}
