// Command podmig-controller moves pods as PodMigration objects ask for, keeps the pods of
// MigratingPod objects running, and moves pods that are deleted and wait. It runs in the cluster; cluster-setup/manifests/controller.yaml installs it.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/tools/controller"
)

func main() {
	if err := command().Execute(); err != nil {
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:           "podmig-controller",
		Short:         "Moves pods as PodMigration objects ask for",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			err := o.run()
			if err != nil {
				fmt.Fprintln(os.Stderr, "podmig-controller:", err)
			}
			return err
		},
	}
	cmd.Flags().IntVar(&o.limits.Cluster, "max-migrations", 5, "migrations that run at a time, 0 for any number")
	cmd.Flags().IntVar(&o.limits.Node, "max-migrations-per-node", 2, "migrations that leave or reach a node at a time, 0 for any number")
	cmd.Flags().StringVar(&o.metrics, "metrics-address", ":8080", "where metrics are served, 0 for nowhere")
	cmd.Flags().StringVar(&o.health, "health-address", ":8081", "where /healthz and /readyz are served")
	cmd.Flags().StringVar(&o.namespace, "leader-election-namespace", "", "namespace of the lease; by default the one that the program runs in")
	return cmd
}

type options struct {
	limits                     controller.Limits
	metrics, health, namespace string
}

func (o options) run() error {
	ctrl.SetLogger(klog.NewKlogr())
	cfg, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the API server: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return err
	}
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return err
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	mgr, err := ctrl.NewManager(cfg, ctrl.Options{
		Scheme:                        scheme,
		Metrics:                       server.Options{BindAddress: o.metrics},
		HealthProbeBindAddress:        o.health,
		LeaderElection:                true,
		LeaderElectionID:              "podmig-controller",
		LeaderElectionNamespace:       o.namespace,
		LeaderElectionReleaseOnCancel: true,
		Cache:                         cache.Options{ByObject: map[client.Object]cache.ByObject{&corev1.Pod{}: {Transform: slim}}},
	})
	if err != nil {
		return fmt.Errorf("set up the manager: %w", err)
	}
	for _, add := range []func(string, healthz.Checker) error{mgr.AddHealthzCheck, mgr.AddReadyzCheck} {
		if err := add("ping", healthz.Ping); err != nil {
			return err
		}
	}
	recorder := mgr.GetEventRecorder("podmig-controller")
	for _, c := range []interface{ SetupWithManager(ctrl.Manager) error }{
		&controller.Migrations{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Recorder: recorder, Limits: o.limits, Now: time.Now},
		&controller.Deletions{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Recorder: recorder, Now: time.Now},
		&controller.MigratingPods{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Recorder: recorder, Now: time.Now},
	} {
		if err := c.SetupWithManager(mgr); err != nil {
			return fmt.Errorf("set up the controllers: %w", err)
		}
	}
	return mgr.Start(ctrl.SetupSignalHandler())
}

// slim keeps of a pod what decides whether somebody looks at it. Every pod of the cluster is
// watched, since finalizers cannot be selected; what decisions depend on is read live.
func slim(o any) (any, error) {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return o, nil
	}
	p.ManagedFields, p.Spec = nil, corev1.PodSpec{NodeName: p.Spec.NodeName}
	p.Status = corev1.PodStatus{Phase: p.Status.Phase, Reason: p.Status.Reason, Conditions: p.Status.Conditions}
	return p, nil
}
