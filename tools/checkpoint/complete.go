package checkpoint

import (
	"context"
	"io"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"podmig.dev/podmig/tools/completion"
)

// completeArguments offers pods that run, then files.
func (o *options) completeArguments(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return o.offer(cmd, func(ctx context.Context, c *corev1client.CoreV1Client) (names []string, err error) {
			namespace, _, err := o.config.ToRawKubeConfigLoader().Namespace()
			if err != nil {
				return nil, err
			}
			all, err := c.Pods(namespace).List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, err
			}
			for _, p := range all.Items {
				if p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
					names = append(names, p.Name)
				}
			}
			return names, nil
		})
	case 1:
		return nil, cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func (o *options) completeFlags(cmd *cobra.Command) {
	completion.Register(cmd, "namespace", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return o.offer(cmd, func(ctx context.Context, c *corev1client.CoreV1Client) (names []string, err error) {
			all, err := c.Namespaces().List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, err
			}
			for _, n := range all.Items {
				names = append(names, n.Name)
			}
			return names, nil
		})
	})
	completion.Contexts(cmd, o.config)
	completion.Register(cmd, "output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
}

// offer asks the API server for words.
func (o *options) offer(cmd *cobra.Command, list func(context.Context, *corev1client.CoreV1Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	return completion.Offer(cmd, func(ctx context.Context) ([]string, error) {
		cfg, err := o.config.ToRESTConfig()
		if err != nil {
			return nil, err
		}
		c, err := corev1client.NewForConfig(cfg)
		if err != nil {
			return nil, err
		}
		return list(ctx, c)
	})
}

// Complete prints what the last of the words may become.
func Complete(out, errOut io.Writer, words []string) error {
	return completion.Run(Command(out, errOut), out, errOut, words)
}
