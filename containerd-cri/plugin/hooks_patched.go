//go:build podmig_patched

package plugin

import (
	"context"
	"time"

	containerd "github.com/containerd/containerd/v2/client"

	"podmig.dev/podmig/containerd-cri/service"
)

const patched = true

type startKey struct{}

type start struct {
	id string
	service.Restore
}

func init() {
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

// startFrom returns the context with which StartContainer restores the container.
func startFrom(ctx context.Context, id string, r service.Restore) context.Context {
	return context.WithValue(ctx, startKey{}, start{id: id, Restore: r})
}
