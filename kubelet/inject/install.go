//go:build podmig_patched

package inject

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/rest"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/cmd/kubelet/app"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/features"
	"k8s.io/kubernetes/pkg/kubelet"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/prober"
	"k8s.io/kubernetes/pkg/kubelet/server"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/agent"
	"podmig.dev/podmig/kubelet/deferral"
	"podmig.dev/podmig/kubelet/guard"
	"podmig.dev/podmig/kubelet/journal"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/snapshot"
	"podmig.dev/podmig/kubelet/wire"
)

var once sync.Once

// Install sets the hooks. A process has one kubelet, so it may be called once.
func Install() {
	installed := false
	once.Do(func() {
		installed = true
		i := &injector{}
		app.UseClientConfig = func(c *rest.Config) { i.client = c }
		kubelet.AdjustDependencies = i.adjust
	})
	if !installed {
		panic("inject: the hooks are already set")
	}
}

// injector connects the hooks with the agent, which exists as soon as the kubelet
// does.
type injector struct {
	// client is how the kubelet talks to the API server; nil without one.
	client  *rest.Config
	guard   *guard.Guard
	agent   *agent.Agent
	metrics *agent.Metrics
	runtime cri.MigrationServiceClient
	// journal is what the agent goes on from.
	journal string
	// draining: the gate is off, and migrations that began before are under way.
	draining bool
	// containers is the runtime past the guard.
	containers *containers
	// snapshots is where checkpoints wait until they are sent.
	snapshots string
}

// adjust is called with the connections to the runtime made and the kubelet not yet
// built.
func (i *injector) adjust(ctx context.Context, cfg *kubeletconfig.KubeletConfiguration, root string, deps *kubelet.Dependencies) error {
	logger := klog.FromContext(ctx)
	i.journal = filepath.Join(root, "migrations")
	i.snapshots = filepath.Join(root, "podcheckpoints")
	// They hold memory of pods, so they go also when the gate was switched off meanwhile.
	if err := snapshot.Clear(i.snapshots); err != nil {
		logger.Error(err, "Checkpoints that an earlier kubelet has left cannot be removed", "path", i.snapshots)
	}
	if !utilfeature.DefaultFeatureGate.Enabled(features.PodMigration) {
		left, err := left(i.journal)
		if err != nil {
			return fmt.Errorf("pod migration is switched off, but not all of its journal can be read: %w", err)
		}
		if len(left) == 0 {
			deps.Options = append(deps.Options, refuseClones)
			return nil
		}
		// Frozen pods would stay frozen, and nobody would know who owns them.
		i.draining = true
		for _, r := range left {
			id := r.Identity
			logger.Info("Pod migration is switched off while a pod moves, bringing its migration to an end", "side", r.Side, "state", r.State,
				"session", id.Session, "source", klog.KRef(id.Namespace, id.SourcePod), "clone", klog.KRef(id.Namespace, id.ClonePod), "peer", id.PeerNode)
		}
	}
	if i.client == nil {
		logger.Info("Pods cannot be moved, the kubelet runs without an API server")
		return nil
	}
	identity, err := nodeIdentity(i.client)
	if err != nil {
		return fmt.Errorf("pod migration: %w", err)
	}
	conn, err := grpc.NewClient(cfg.ContainerRuntimeEndpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("pod migration: connect to the container runtime: %w", err)
	}
	runtime := deps.RemoteRuntimeService
	i.guard = guard.New()
	i.runtime = cri.NewMigrationServiceClient(conn)
	deps.RemoteRuntimeService = i.guard.Wrap(runtime)
	if deps.Recorder != nil {
		deps.Recorder = &recorder{deps.Recorder, i.guard}
	}

	deps.Options = append(deps.Options, func(kl *kubelet.Kubelet) {
		// An option cannot fail. The guard keeps every pod untouched until the journal
		// was read, so a kubelet that goes on without it does no harm; it ends here all
		// the same, because it could do no good either.
		i.containers = &containers{runtime}
		if err := i.attach(ctx, kl, identity); err != nil {
			logger.Error(err, "Pod migration cannot start")
			klog.FlushAndExit(klog.ExitFlushTimeout, 1)
		}
	})
	return nil
}

// left are the records of a journal, if there is one.
func left(dir string) ([]migration.Record, error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	j, err := journal.Open(dir)
	if err != nil {
		return nil, err
	}
	return j.List()
}

// syncPod stands in for the runtime's SyncPod.
type syncPod func(context.Context, *v1.Pod, *kubecontainer.PodStatus, func(*v1.Pod) kubecontainer.PodSyncResult) kubecontainer.PodSyncResult

// refuseClones sets what a kubelet does whose gate is off.
func refuseClones(kl *kubelet.Kubelet) {
	// Standalone there are no clones.
	if kl.KubeClient() != nil {
		kubelet.SyncRuntimePod = refusing(&node{kl}, &apiServer{kl.KubeClient()})
	}
}

// refusing refuses clones: one that was started like any other pod would be a second
// copy with nothing of the state of the first.
func refusing(n agent.Node, api agent.API) syncPod {
	return func(ctx context.Context, pod *v1.Pod, status *kubecontainer.PodStatus, sync func(*v1.Pod) kubecontainer.PodSyncResult) kubecontainer.PodSyncResult {
		// One that runs has taken over while the gate was on.
		runs := slices.ContainsFunc(status.ContainerStatuses, func(c *kubecontainer.Status) bool { return c.State == kubecontainer.ContainerStateRunning })
		if n.ClonePod(pod) == "" || agent.IsCloned(pod) || runs {
			return sync(pod)
		}
		var result kubecontainer.PodSyncResult
		result.Fail(agent.Refuse(ctx, n, api, pod))
		return result
	}
}

// attach makes the agent and lets it continue what the journal knows.
func (i *injector) attach(ctx context.Context, kl *kubelet.Kubelet, identity *tls.Config) error {
	j, err := journal.Open(i.journal)
	if err != nil {
		return err
	}
	limits, err := deadlines()
	if err != nil {
		return fmt.Errorf("read the deadlines: %w", err)
	}
	i.metrics = agent.NewMetrics()
	for _, c := range i.metrics.All() {
		legacyregistry.MustRegister(c)
	}
	i.agent = agent.New(ctx, agent.Config{
		Node:         &node{kl},
		API:          &apiServer{kl.KubeClient()},
		Containers:   i.containers,
		Runtime:      i.runtime,
		Checkpointer: i.containers.runtime,
		Journal:      j,
		Guard:        i.guard,
		Metrics:      i.metrics,
		Point:        faultPoint,
		Deadlines:    limits,
		Draining:     i.draining,
		DialStream:   agent.DialStream,
		Dial: func(name, address string) (agent.Peer, error) {
			cfg := identity.Clone()
			// The API server's name, which the kubeconfig may give, is not the peer's.
			cfg.ServerName = ""
			c, err := peer.NewClient(peer.ClientConfig{Address: address, Node: name, TLS: cfg})
			if err != nil {
				return nil, err
			}
			return agent.Remote{Client: c}, nil
		},
	})
	kubelet.SyncRuntimePod = i.sync
	if i.draining {
		refuse := refusing(&node{kl}, &apiServer{kl.KubeClient()})
		kubelet.SyncRuntimePod = func(ctx context.Context, pod *v1.Pod, known *kubecontainer.PodStatus, sync func(*v1.Pod) kubecontainer.PodSyncResult) kubecontainer.PodSyncResult {
			if i.agent.Knows(string(pod.UID)) {
				return i.sync(ctx, pod, known, sync)
			}
			return refuse(ctx, pod, known, sync)
		}
	} else {
		podutil.DeletionDeferred = func(pod *v1.Pod) bool { return deferral.Waits(pod, time.Now()) }
		kl.AddPodSyncLoopHandler(&deletions{
			node: &node{kl}, terminating: kl.PodTerminationRequested, now: time.Now, told: make(map[types.UID]bool),
		})
	}
	kubelet.RefuseKill = func(pod *v1.Pod) error { return i.agent.RefuseKill(string(pod.UID)) }
	prober.ProbesSuspended = func(uid types.UID) bool { return i.agent.ProbesSuspended(string(uid)) }
	server.MigrationHandler = i.handler
	return i.agent.Recover()
}

// sync stands in for the runtime's SyncPod.
func (i *injector) sync(ctx context.Context, pod *v1.Pod, known *kubecontainer.PodStatus, sync func(*v1.Pod) kubecontainer.PodSyncResult) kubecontainer.PodSyncResult {
	var result kubecontainer.PodSyncResult
	if !i.agent.Takes(pod) {
		if pod.Spec.ClonePod != "" && i.outdated(ctx, pod, known) {
			// The kubelet syncs the pod again when it hears that its containers run.
			klog.FromContext(ctx).Info("The clone's containers were restored a moment ago, waiting for their status", "pod", klog.KObj(pod))
			return result
		}
		return sync(pod)
	}
	err := i.agent.Sync(ctx, pod, func(shell *v1.Pod) error {
		result = sync(shell)
		return result.Error()
	})
	if err != nil && result.Error() == nil {
		result.Fail(err)
	}
	return result
}

// outdated tells whether what the kubelet knows of a clone is older than its restore.
// A kubelet that restarts in a migration can meet the pod for the first time when the
// clone runs already, with a status from before. It would take a container that was
// created and never started for one that has to be made again.
func (i *injector) outdated(ctx context.Context, pod *v1.Pod, known *kubecontainer.PodStatus) bool {
	created := make(map[string]bool)
	for _, c := range known.ContainerStatuses {
		if c.State == kubecontainer.ContainerStateCreated {
			created[c.ID.ID] = true
		}
	}
	if len(created) == 0 {
		return false
	}
	_, cs, err := i.containers.Of(ctx, string(pod.UID))
	// Without an answer nothing could be made again either.
	return err != nil || slices.ContainsFunc(cs, func(c agent.Container) bool { return c.Running && created[c.ID] })
}

func (i *injector) handler(ctx context.Context, auth server.AuthInterface) (http.Handler, server.AuthInterface) {
	if auth == nil {
		// The port without authentication has nothing for other nodes.
		return nil, nil
	}
	identify := func(r *http.Request) (string, bool) {
		// The filter in front has authenticated and authorised this request already and
		// keeps to itself who it was.
		info, ok, err := auth.AuthenticateRequest(r)
		if err != nil || !ok {
			return "", false
		}
		return info.User.GetName(), true
	}
	s := peer.NewServer(ctx, i.agent, identify)
	s.Refused = func(v wire.Verb, c wire.Code) {
		i.metrics.Refused.WithLabelValues(string(v), string(c)).Inc()
	}
	h := routes{migrations: s, checkpoints: http.NotFoundHandler()}
	if !i.draining {
		h.checkpoints = snapshot.New(ctx, i.agent, i.snapshots, identify)
	}
	return h, &watched{auth, s.RefusedBefore}
}

// routes are what is served below the two paths of the hook.
type routes struct{ migrations, checkpoints http.Handler }

func (h routes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// What the kubelet has authorised as one must not be served as the other.
	if strings.HasPrefix(r.URL.Path, server.PodCheckpointPath) {
		h.checkpoints.ServeHTTP(w, r)
		return
	}
	h.migrations.ServeHTTP(w, r)
}

// nodeIdentity returns with which certificate the kubelet talks to the API server
// and whom it trusts there. Kubelets use the same towards each other.
func nodeIdentity(c *rest.Config) (*tls.Config, error) {
	var cfg *tls.Config
	var err error
	if c.Transport != nil {
		// With certificate rotation the transport has the certificates.
		cfg, err = utilnet.TLSClientConfig(c.Transport)
	} else {
		cfg, err = rest.TLSConfigFor(c)
	}
	if err != nil {
		return nil, fmt.Errorf("read the kubelet's client certificate: %w", err)
	}
	if cfg == nil || cfg.RootCAs == nil || len(cfg.Certificates) == 0 && cfg.GetClientCertificate == nil {
		return nil, errors.New("the kubelet talks to the API server without a client certificate or without verifying it; give it a kubeconfig with both")
	}
	return cfg, nil
}
