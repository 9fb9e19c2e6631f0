package plugin

import (
	"context"
	"fmt"
	"sync"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podmig.dev/podmig/containerd-cri/runtime/criu"
	"podmig.dev/podmig/containerd-cri/runtime/runc"
	"podmig.dev/podmig/containerd-cri/service"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// namespace is where the CRI service keeps its containers.
const namespace = "k8s.io"

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.GRPCPlugin,
		ID:   "podmig-migration",
		// Not the CRI plugin itself: a plugin may not require its own type. Register
		// looks it up, when all gRPC plugins are there.
		Requires: []plugin.Type{
			plugins.EventPlugin,
			plugins.LeasePlugin,
			plugins.SandboxStorePlugin,
			plugins.TransferPlugin,
			plugins.MountManagerPlugin,
			plugins.ServicePlugin,
			plugins.CRIServicePlugin,
		},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			client, err := containerd.New("", containerd.WithDefaultNamespace(namespace), containerd.WithInMemoryServices(ic))
			if err != nil {
				return nil, fmt.Errorf("client for the migration service: %w", err)
			}
			return &grpcService{ic: ic, client: client, dir: ic.Properties[plugins.PropertyStateDir]}, nil
		},
	})
}

type grpcService struct {
	ic     *plugin.InitContext
	client *containerd.Client
	dir    string

	once sync.Once
	svc  *service.Service
	err  error
}

// Register is called by containerd's gRPC server for each gRPC plugin.
func (g *grpcService) Register(s *grpc.Server) error {
	g.once.Do(func() { g.svc, g.err = g.start(g.ic.Context) })
	if g.err != nil {
		return fmt.Errorf("migration service: %w", g.err)
	}
	migration.RegisterMigrationServiceServer(s, g.svc)
	return nil
}

// Close ends the service with containerd.
func (g *grpcService) Close() error {
	if g.svc == nil {
		return nil
	}
	return g.svc.Close()
}

func (g *grpcService) start(ctx context.Context) (*service.Service, error) {
	p, err := g.ic.GetByID(plugins.GRPCPlugin, "cri")
	if err != nil {
		return nil, fmt.Errorf("the CRI plugin is needed: %w", err)
	}
	runtimeService, ok := p.(cri.RuntimeServiceServer)
	if !ok {
		return nil, fmt.Errorf("the CRI plugin is a %T, which serves no runtime.v1", p)
	}
	initialized := func() bool { return true }
	if i, ok := p.(interface{ IsInitialized() bool }); ok {
		initialized = i.IsInitialized
	}
	svc, err := service.New(ctx, service.Config{
		Dir:            g.dir,
		Containers:     &containers{client: g.client, cri: runtimeService, initialized: initialized},
		Pods:           &pods{cri: runtimeService, initialized: initialized},
		Runtime:        runc.New(),
		Scratch:        service.Tmpfs{},
		CheckImages:    criu.Check,
		RuntimeName:    "containerd",
		RuntimeVersion: version.Version,
		CRIUOptions:    runc.RestoreOptions,
	})
	if err != nil {
		return nil, err
	}
	servePods(svc)
	return svc, nil
}
