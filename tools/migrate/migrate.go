// Package migrate is kubectl's plugin migrate: it moves a pod by a PodMigration object
// and follows it to its end.
//
// What happens to the pod is decided by the controller and the kubelets; interrupting the
// plugin changes nothing of it.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/printers"
	toolscache "k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// EndedError is a migration that has ended without success.
type EndedError struct {
	Pod     string
	Phase   v1alpha1.Phase
	Reason  string
	Message string
}

func (e *EndedError) Error() string {
	what := map[v1alpha1.Phase]string{
		v1alpha1.PhaseRefused:    "cannot be moved and runs on",
		v1alpha1.PhaseRolledBack: "was not moved and runs on",
		v1alpha1.PhaseCancelled:  "was not moved and runs on",
		v1alpha1.PhaseFailed:     "was not moved and does not run any more",
	}[e.Phase]
	return fmt.Sprintf("pod %s %s: %s: %s", e.Pod, what, e.Reason, e.Message)
}

// Code is what the plugin exits with, part of its interface: 3 refused before the freeze,
// 4 rolled back, 5 lost, 6 cancelled. 1 is any other error.
func (e *EndedError) Code() int {
	switch e.Phase {
	case v1alpha1.PhaseRefused:
		return 3
	case v1alpha1.PhaseRolledBack:
		return 4
	case v1alpha1.PhaseFailed:
		return 5
	case v1alpha1.PhaseCancelled:
		return 6
	}
	return 1
}

type options struct {
	config         *genericclioptions.ConfigFlags
	out, errOut    io.Writer
	pod, node      string
	selector       map[string]string
	timeout        time.Duration
	priority       int32
	noWait, cancel bool
	output         string
}

// Command returns the plugin's command. What it prints about progress goes to errOut.
func Command(out, errOut io.Writer) *cobra.Command {
	o := &options{config: genericclioptions.NewConfigFlags(true), out: out, errOut: errOut}
	cmd := &cobra.Command{
		Use:   "kubectl-migrate POD [NODE]",
		Short: "Move a running pod to another node, with its processes, memory and files",
		Long: `Move a running pod to another node, with its processes, memory and files.

The pod goes on as a new pod, whose name is printed. Exit codes: 0 the pod has moved, 3 it cannot be moved (it was never
stopped), 4 something went wrong and it runs on where it was, 5 it does not run any more, 6 the move was cancelled, 1 any
other error.`,
		Example: `  kubectl migrate redis                      # to any other node
  kubectl migrate redis node2 -n shop
  kubectl migrate redis --node-selector disk=ssd --timeout 2m
  kubectl migrate redis --cancel`,
		Args:          cobra.RangeArgs(1, 2),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.pod = args[0]
			if len(args) > 1 {
				o.node = args[1]
			}
			return o.run(cmd.Context())
		},
	}
	o.config.AddFlags(cmd.Flags())
	f := cmd.Flags()
	f.StringToStringVar(&o.selector, "node-selector", nil, "labels that the target must have")
	f.DurationVar(&o.timeout, "timeout", 10*time.Minute, "how long the migration may take, in whole seconds; the pod runs on if it takes longer")
	f.Int32Var(&o.priority, "priority", 0, "order among migrations that wait for their turn, highest first")
	f.BoolVar(&o.noWait, "no-wait", false, "print the name of the migration and do not follow it")
	f.BoolVar(&o.cancel, "cancel", false, "cancel the pod's migrations; it runs on where it is")
	f.StringVarP(&o.output, "output", "o", "", "print the migration as name, json or yaml instead of the new pod's name")
	return cmd
}

func (o *options) run(ctx context.Context) error {
	if o.node != "" && len(o.selector) > 0 {
		return errors.New("give a node or --node-selector, not both")
	}
	if o.timeout < time.Second {
		return fmt.Errorf("--timeout is %s: give a second or more", o.timeout)
	}
	if !slices.Contains([]string{"", "name", "json", "yaml"}, o.output) {
		return fmt.Errorf("--output is %q: give name, json or yaml", o.output)
	}
	cfg, err := o.config.ToRESTConfig()
	if err != nil {
		return err
	}
	namespace, _, err := o.config.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return err
	}
	c, err := client.NewWithWatch(cfg, client.Options{Scheme: scheme})
	if err != nil {
		return err
	}
	if o.cancel {
		return explain(o.cancelAll(ctx, c, namespace))
	}
	m := &v1alpha1.PodMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, GenerateName: o.pod + "-"},
		Spec: v1alpha1.PodMigrationSpec{
			PodName: o.pod, TargetNode: o.node, NodeSelector: o.selector, TimeoutSeconds: int32(o.timeout / time.Second), Priority: o.priority,
		},
	}
	if err := c.Create(ctx, m); err != nil {
		return explain(err)
	}
	if o.noWait {
		return o.print(m, "podmigration.podmig.dev/"+m.Name)
	}
	ended, err := o.follow(ctx, c, m)
	if ctx.Err() != nil {
		return fmt.Errorf("not followed any more, the migration goes on: kubectl migrate -n %s %s --cancel ends it", namespace, o.pod)
	}
	if err != nil {
		return err
	}
	if ended.Status.Phase != v1alpha1.PhaseSucceeded {
		return errors.Join(o.printObject(ended), &EndedError{Pod: o.pod, Phase: ended.Status.Phase, Reason: ended.Status.Reason, Message: ended.Status.Message})
	}
	return o.print(ended, "pod/"+ended.Status.ClonePodName)
}

// explain tells what is missing in a cluster that knows no migrations.
func explain(err error) error {
	if meta.IsNoMatchError(err) {
		return fmt.Errorf("the cluster knows no PodMigration objects: install podmig's custom resource definitions and its controller: %w", err)
	}
	return err
}

// print writes the object as asked for, or a name if nothing was asked for.
func (o *options) print(m *v1alpha1.PodMigration, name string) error {
	if o.output == "" {
		_, err := fmt.Fprintln(o.out, name)
		return err
	}
	return o.printObject(m)
}

func (o *options) printObject(m *v1alpha1.PodMigration) error {
	m.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodMigration"))
	switch o.output {
	case "name":
		return (&printers.NamePrinter{}).PrintObj(m, o.out)
	case "json":
		return (&printers.JSONPrinter{}).PrintObj(m, o.out)
	case "yaml":
		return (&printers.YAMLPrinter{}).PrintObj(m, o.out)
	}
	return nil
}

// follow tells what happens to a migration and returns it when it is over.
func (o *options) follow(ctx context.Context, c client.WithWatch, m *v1alpha1.PodMigration) (*v1alpha1.PodMigration, error) {
	began, last := time.Now(), ""
	gone := &EndedError{Pod: o.pod, Phase: v1alpha1.PhaseCancelled, Reason: v1alpha1.ReasonCancelled, Message: "Somebody has deleted the migration."}
	there := func(s toolscache.Store) (bool, error) {
		if len(s.List()) == 0 {
			return false, gone
		}
		return false, nil
	}
	e, err := watchtools.UntilWithSync(ctx, one(c, m), &v1alpha1.PodMigration{}, there, func(e watch.Event) (bool, error) {
		now, ok := e.Object.(*v1alpha1.PodMigration)
		if !ok {
			return false, nil
		}
		if now.UID != m.UID || e.Type == watch.Deleted {
			return false, gone
		}
		line := fmt.Sprintf("%s %s", now.Status.Phase, now.Status.Message)
		if now.Status.Phase != "" && line != last {
			fmt.Fprintf(o.errOut, "%6.1fs  %-12s  %s\n", time.Since(began).Seconds(), now.Status.Phase, now.Status.Message)
			last = line
		}
		return now.Status.Phase.Over(), nil
	})
	if err != nil {
		return nil, err
	}
	return e.Object.(*v1alpha1.PodMigration), nil
}

// one lists and watches one object.
func one(c client.WithWatch, m *v1alpha1.PodMigration) toolscache.ListerWatcher {
	with := func(l metav1.ListOptions) *client.ListOptions {
		return &client.ListOptions{Namespace: m.Namespace, FieldSelector: fields.OneTermEqualSelector("metadata.name", m.Name), Raw: &l}
	}
	return &toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, l metav1.ListOptions) (runtime.Object, error) {
			var all v1alpha1.PodMigrationList
			return &all, c.List(ctx, &all, with(l))
		},
		WatchFuncWithContext: func(ctx context.Context, l metav1.ListOptions) (watch.Interface, error) {
			return c.Watch(ctx, &v1alpha1.PodMigrationList{}, with(l))
		},
	}
}

// cancelAll deletes the pod's migrations that run or wait, and returns when they are gone.
func (o *options) cancelAll(ctx context.Context, c client.WithWatch, namespace string) error {
	var all v1alpha1.PodMigrationList
	if err := c.List(ctx, &all, client.InNamespace(namespace)); err != nil {
		return err
	}
	found := false
	for i := range all.Items {
		m := &all.Items[i]
		if m.Spec.PodName != o.pod || m.Status.Phase.Over() {
			continue
		}
		found = true
		if err := c.Delete(ctx, m); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("cancel migration %s: %w", m.Name, err)
		}
		ended, err := o.follow(ctx, c, m)
		var gone *EndedError
		switch {
		case errors.As(err, &gone):
			fmt.Fprintf(o.out, "podmigration.podmig.dev/%s cancelled\n", m.Name)
		case err != nil:
			return err
		case ended.Status.Phase == v1alpha1.PhaseSucceeded:
			return fmt.Errorf("it was too late to cancel migration %s: %s", m.Name, ended.Status.Message)
		default:
			fmt.Fprintf(o.out, "podmigration.podmig.dev/%s cancelled\n", m.Name)
		}
	}
	if !found {
		return fmt.Errorf("no migration of pod %s runs or waits in namespace %s", o.pod, namespace)
	}
	return nil
}
