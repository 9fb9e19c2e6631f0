package migrate

import (
	"context"
	"io"
	"slices"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/tools/completion"
)

// completeArguments offers pods that can be moved, then the nodes that they are not on.
func (o *options) completeArguments(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if o.from != "" || len(args) > 1 || len(args) > 0 && o.to != "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return o.offer(cmd, func(ctx context.Context, c client.Reader) ([]string, error) {
		namespace, _, err := o.config.ToRawKubeConfigLoader().Namespace()
		if err != nil {
			return nil, err
		}
		if len(args) == 0 {
			var pods corev1.PodList
			err := c.List(ctx, &pods, client.InNamespace(namespace))
			pods.Items = slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool {
				what, _ := fit(&p)
				return what != ready
			})
			return names(pods.Items, func(p corev1.Pod) string { return p.Name }), err
		}
		var p corev1.Pod
		if err := c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: args[0]}, &p); client.IgnoreNotFound(err) != nil {
			return nil, err
		}
		return nodes(ctx, c, p.Spec.NodeName)
	})
}

func (o *options) completeFlags(cmd *cobra.Command) {
	for flag, list := range map[string]func(context.Context, client.Reader) ([]string, error){
		"from": func(ctx context.Context, c client.Reader) ([]string, error) { return nodes(ctx, c, o.to) },
		"to":   func(ctx context.Context, c client.Reader) ([]string, error) { return nodes(ctx, c, o.from) },
		"namespace": func(ctx context.Context, c client.Reader) ([]string, error) {
			var all corev1.NamespaceList
			err := c.List(ctx, &all)
			return names(all.Items, func(n corev1.Namespace) string { return n.Name }), err
		},
	} {
		completion.Register(cmd, flag, func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return o.offer(cmd, list)
		})
	}
	completion.Contexts(cmd, o.config)
	completion.Register(cmd, "output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))
	completion.Register(cmd, "dry-run", cobra.FixedCompletions([]string{"none", "server"}, cobra.ShellCompDirectiveNoFileComp))
	completion.Register(cmd, "on-failure", cobra.FixedCompletions([]string{string(v1alpha1.FailureRunOn), string(v1alpha1.FailureEvict)}, cobra.ShellCompDirectiveNoFileComp))
	for _, flag := range []string{"node-selector", "selector", "timeout", "priority", "freeze-budget"} {
		completion.Register(cmd, flag, cobra.NoFileCompletions)
	}
}

// offer asks the API server for words.
func (o *options) offer(cmd *cobra.Command, list func(context.Context, client.Reader) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	return completion.Offer(cmd, func(ctx context.Context) ([]string, error) {
		c, err := o.connect()
		if err != nil {
			return nil, err
		}
		return list(ctx, c)
	})
}

// nodes are all but one.
func nodes(ctx context.Context, c client.Reader, but string) ([]string, error) {
	var all corev1.NodeList
	err := c.List(ctx, &all)
	return slices.DeleteFunc(names(all.Items, func(n corev1.Node) string { return n.Name }), func(name string) bool { return name == but }), err
}

func names[T any](objects []T, name func(T) string) []string {
	var out []string
	for _, o := range objects {
		out = append(out, name(o))
	}
	return out
}

// Complete prints what the last of the words may become.
func Complete(out, errOut io.Writer, words []string) error {
	return completion.Run(Command(out, errOut), out, errOut, words)
}
