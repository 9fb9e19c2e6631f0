// Package migrate is kubectl's plugin migrate: it moves a pod, or all pods of a node, by
// PodMigration objects and follows them to their end.
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
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/cli-runtime/pkg/genericclioptions"
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

// ExitCode is what a program ends with after an error of the command, 0 without one.
func ExitCode(err error) int {
	var coded interface{ Code() int }
	switch {
	case err == nil:
		return 0
	case errors.As(err, &coded):
		return coded.Code()
	}
	return 1
}

type options struct {
	config      *genericclioptions.ConfigFlags
	out, errOut io.Writer
	// connect makes the client.
	connect  func() (client.WithWatch, error)
	pod, to  string
	selector map[string]string
	timeout  time.Duration
	priority int32
	wait     bool
	noWait   bool
	cancel   bool
	dryRun   string
	budget   time.Duration
	// onFailure is a word of the API.
	onFailure string
	output    string

	// from is the node to be emptied, scope the namespace of the pods, empty for all, and pods
	// the label selector that they match.
	from, scope, pods string
	noCordon          bool
}

// Command returns the plugin's command. What it prints about progress goes to errOut.
func Command(out, errOut io.Writer) *cobra.Command {
	o := &options{config: genericclioptions.NewConfigFlags(true), out: out, errOut: errOut}
	o.connect = func() (client.WithWatch, error) { return connect(o.config) }
	return o.command()
}

func (o *options) command() *cobra.Command {
	cmd := &cobra.Command{
		Use:         "kubectl-migrate POD [NODE] | --from NODE",
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl migrate"},
		Short:       "Move a running pod to another node, with its processes, memory and files",
		Long: `Move a running pod, or all pods of a node, to another node, with processes, memory and files.

The pod goes on as a new pod, whose name is printed. Exit codes: 0 the pod has moved, 3 it cannot be moved (it was never
stopped), 4 something went wrong and it runs on where it was, 5 it does not run any more, 6 the move was cancelled, 1 any
other error.

With --from, the node is cordoned, and every running pod on it is moved, in all namespaces unless one is given. Pods that a
PodDisruptionBudget selects move only as many at a time as it allows; those that still find no place when nothing has moved
for the --timeout are held back. Pods of DaemonSets and static pods are part of their node and are ignored. The exit code
is the worst of all pods, in the order 5, 4, 3, 6; a pod that is left counts as 3.`,
		Example: `  kubectl migrate redis                      # to any other node
  kubectl migrate redis node2 -n shop
  kubectl migrate redis --node-selector disk=ssd --timeout 2m
  kubectl migrate redis --dry-run=server     # can it, and what would be moved?
  kubectl migrate redis --cancel
  kubectl migrate --from node1               # all pods of node1
  kubectl migrate --from node1 --to node2 -n shop --selector app=redis`,
		Args:              o.arguments,
		ValidArgsFunction: o.completeArguments,
		SilenceUsage:      true,
		SilenceErrors:     true,
		RunE:              func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	o.config.AddFlags(cmd.Flags())
	f := cmd.Flags()
	f.StringVar(&o.from, "from", "", "move all pods of this node")
	f.StringVar(&o.to, "to", "", "the node to move to, as the second argument")
	f.StringVarP(&o.pods, "selector", "l", "", "with --from, labels of the pods to move")
	f.BoolVar(&o.noCordon, "no-cordon", false, "with --from, let the node take pods meanwhile")
	f.StringToStringVar(&o.selector, "node-selector", nil, "labels that the target must have")
	f.DurationVar(&o.timeout, "timeout", 10*time.Minute, "how long a migration may take, in whole seconds; the pod runs on if it takes longer")
	f.Int32Var(&o.priority, "priority", 0, "order among migrations that wait for their turn, highest first")
	f.BoolVar(&o.wait, "wait", true, "follow the migration to its end; --wait=false is --no-wait")
	f.BoolVar(&o.noWait, "no-wait", false, "print the name of the migration and do not follow it; with --from, order those that may begin now")
	f.BoolVar(&o.cancel, "cancel", false, "cancel the pod's migrations, or those of all pods of the node; they run on where they are")
	f.DurationVar(&o.budget, "freeze-budget", 0, "for how long the pod may stand still until the memory that it still writes is sent; it is not frozen if that would take longer")
	f.StringVar(&o.onFailure, "on-failure", string(v1alpha1.FailureRunOn), "what becomes of a pod that cannot be moved: RunOn or Evict")
	f.StringVar(&o.dryRun, "dry-run", "none", "server: only find out whether the pod can be moved, as far as that is seen without freezing it")
	f.StringVarP(&o.output, "output", "o", "", "print the migration as name, json, yaml or wide instead of the new pod's name")
	o.completeFlags(cmd)
	return cmd
}

// arguments takes the pod and the node.
func (o *options) arguments(cmd *cobra.Command, args []string) error {
	if o.from != "" {
		if len(args) > 0 {
			return errors.New("give a pod or --from, not both; --to names the target")
		}
		return nil
	}
	if err := cobra.RangeArgs(1, 2)(cmd, args); err != nil {
		return fmt.Errorf("give a pod, or a node with --from: %w", err)
	}
	if len(args) > 1 && o.to != "" {
		return errors.New("give a second argument or --to, not both")
	}
	o.pod = args[0]
	if len(args) > 1 {
		o.to = args[1]
	}
	return nil
}

func (o *options) check() error {
	switch {
	case o.to != "" && len(o.selector) > 0:
		return errors.New("give a node or --node-selector, not both")
	case o.from != "" && o.from == o.to:
		return fmt.Errorf("--from and --to are both %s: name another node", o.to)
	case o.from == "" && (o.pods != "" || o.noCordon):
		return errors.New("--selector and --no-cordon need --from")
	case o.dryRun != "none" && o.dryRun != "server":
		return fmt.Errorf("--dry-run is %q: give server or none; what stands in the way is known to the two nodes only", o.dryRun)
	case o.dryRun == "server" && (o.from != "" || o.noWait || o.cancel):
		return errors.New("--dry-run=server is for one pod and waits for the answer: leave out --from, --no-wait and --cancel")
	case o.budget != 0 && o.budget < time.Millisecond:
		return fmt.Errorf("--freeze-budget is %s: give a millisecond or more", o.budget)
	case o.onFailure != string(v1alpha1.FailureRunOn) && o.onFailure != string(v1alpha1.FailureEvict):
		return fmt.Errorf("--on-failure is %q: give %s or %s", o.onFailure, v1alpha1.FailureRunOn, v1alpha1.FailureEvict)
	case o.timeout < time.Second:
		return fmt.Errorf("--timeout is %s: give a second or more", o.timeout)
	case o.output != "" && !slices.Contains(outputs, o.output):
		return fmt.Errorf("--output is %q: give %s", o.output, strings.Join(outputs, ", "))
	}
	return nil
}

// connect makes a client from what the flags say.
func connect(config genericclioptions.RESTClientGetter) (client.WithWatch, error) {
	cfg, err := config.ToRESTConfig()
	if err != nil {
		return nil, err
	}
	// The API server limits its clients itself, and a node may have hundreds of pods.
	cfg.QPS = -1
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1alpha1.AddToScheme, corev1.AddToScheme, policyv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return client.NewWithWatch(cfg, client.Options{Scheme: scheme})
}

func (o *options) run(ctx context.Context) error {
	o.noWait = o.noWait || !o.wait
	if err := o.check(); err != nil {
		return err
	}
	c, err := o.connect()
	if err != nil {
		return explain(err)
	}
	if o.from != "" {
		// The namespace of a context is no reason to leave pods on the node.
		o.scope = *o.config.Namespace
		n, err := o.node(c)
		switch {
		case err != nil:
			return err
		case o.cancel:
			return explain(n.cancelAll(ctx))
		}
		return n.empty(ctx)
	}
	namespace, _, err := o.config.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return err
	}
	if o.cancel {
		return explain(o.cancelAll(ctx, c, namespace))
	}
	m := o.migration(namespace, o.pod)
	if o.dryRun == "server" {
		// Nobody needs a record of it.
		m.Spec.DryRun, m.Spec.TTLSecondsAfterFinished = true, new(int32)
		*m.Spec.TTLSecondsAfterFinished = 60
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
	if ended.Spec.DryRun {
		return o.print(ended, ended.Status.Message)
	}
	return o.print(ended, "pod/"+ended.Status.ClonePodName)
}

// migration is the order to move a pod.
func (o *options) migration(namespace, pod string) *v1alpha1.PodMigration {
	m := &v1alpha1.PodMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, GenerateName: pod + "-"},
		Spec: v1alpha1.PodMigrationSpec{
			PodName: pod, TargetNode: o.to, NodeSelector: o.selector, TimeoutSeconds: int32(o.timeout / time.Second), Priority: o.priority,
			OnFailure: v1alpha1.OnFailure(o.onFailure),
		},
	}
	if o.budget > 0 {
		ms := int32(o.budget.Milliseconds())
		m.Spec.FreezeBudgetMilliseconds = &ms
	}
	return m
}

// explain tells what is missing in a cluster that knows no migrations.
func explain(err error) error {
	if meta.IsNoMatchError(err) {
		return fmt.Errorf("the cluster knows no PodMigration objects: install podmig's custom resource definitions and its controller: %w", err)
	}
	return err
}

// deletedMessage is of a migration whose object was deleted before it was over.
const deletedMessage = "Somebody has deleted the migration."

// follow tells what happens to a migration and returns it when it is over.
func (o *options) follow(ctx context.Context, c client.WithWatch, m *v1alpha1.PodMigration) (*v1alpha1.PodMigration, error) {
	began, last := time.Now(), ""
	var rate meter
	gone := &EndedError{Pod: m.Spec.PodName, Phase: v1alpha1.PhaseCancelled, Reason: v1alpha1.ReasonCancelled, Message: deletedMessage}
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
		text := strings.TrimSpace(now.Status.Message + "  " + rate.read(now, time.Now()))
		line := fmt.Sprintf("%s %s", now.Status.Phase, text)
		if now.Status.Phase != "" && line != last {
			fmt.Fprintf(o.errOut, "%6.1fs  %-12s  %s\n", time.Since(began).Seconds(), now.Status.Phase, text)
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
	return listWatch(c, &v1alpha1.PodMigrationList{}, client.InNamespace(m.Namespace),
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("metadata.name", m.Name)})
}

// listWatch lists and watches what the options select.
func listWatch(c client.WithWatch, kind client.ObjectList, opts ...client.ListOption) toolscache.ListerWatcher {
	with := func(l metav1.ListOptions) *client.ListOptions {
		return (&client.ListOptions{Raw: &l}).ApplyOptions(opts)
	}
	return &toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, l metav1.ListOptions) (runtime.Object, error) {
			all := kind.DeepCopyObject().(client.ObjectList)
			return all, c.List(ctx, all, with(l))
		},
		WatchFuncWithContext: func(ctx context.Context, l metav1.ListOptions) (watch.Interface, error) {
			return c.Watch(ctx, kind.DeepCopyObject().(client.ObjectList), with(l))
		},
	}
}

// cancelAll cancels the pod's migrations.
func (o *options) cancelAll(ctx context.Context, c client.WithWatch, namespace string) error {
	found, err := o.cancelWhere(ctx, c, namespace, func(m *v1alpha1.PodMigration) bool { return m.Spec.PodName == o.pod })
	if err == nil && found == 0 {
		return fmt.Errorf("no migration of pod %s runs or waits in namespace %s", o.pod, namespace)
	}
	return err
}

// cancelWhere deletes the migrations that run or wait and are meant, and returns how many
// there were when they are gone.
func (o *options) cancelWhere(ctx context.Context, c client.WithWatch, namespace string, meant func(*v1alpha1.PodMigration) bool) (int, error) {
	var all v1alpha1.PodMigrationList
	if err := c.List(ctx, &all, client.InNamespace(namespace)); err != nil {
		return 0, err
	}
	all.Items = slices.DeleteFunc(all.Items, func(m v1alpha1.PodMigration) bool { return m.Status.Phase.Over() || !meant(&m) })
	var faults []error
	for i := range all.Items {
		if err := c.Delete(ctx, &all.Items[i]); client.IgnoreNotFound(err) != nil {
			faults = append(faults, fmt.Errorf("cancel migration %s: %w", all.Items[i].Name, err))
		}
	}
	if len(faults) > 0 {
		return 0, errors.Join(faults...)
	}
	for i := range all.Items {
		m := &all.Items[i]
		ended, err := o.follow(ctx, c, m)
		var gone *EndedError
		switch {
		case errors.As(err, &gone):
			fmt.Fprintf(o.out, "podmigration.podmig.dev/%s cancelled\n", m.Name)
		case err != nil:
			return 0, err
		case ended.Status.Phase == v1alpha1.PhaseSucceeded:
			faults = append(faults, fmt.Errorf("it was too late to cancel migration %s: %s", m.Name, ended.Status.Message))
		default:
			fmt.Fprintf(o.out, "podmigration.podmig.dev/%s cancelled\n", m.Name)
		}
	}
	return len(all.Items), errors.Join(faults...)
}
