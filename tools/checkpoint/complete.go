package checkpoint

import (
	"cmp"
	"context"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
)

// completionTime is for how long a shell waits for an API server that does not answer.
const completionTime = 5 * time.Second

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
	register(cmd, "namespace", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
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
	register(cmd, "context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		cfg, err := o.config.ToRawKubeConfigLoader().RawConfig()
		if err != nil {
			return failed(err)
		}
		return slices.Sorted(maps.Keys(cfg.Contexts)), cobra.ShellCompDirectiveNoFileComp
	})
	register(cmd, "output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
}

func register(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	// It fails for a flag that is not there or has a function already.
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err)
	}
}

// offer asks the API server for words. (The shell picks those that begin as typed.)
func (o *options) offer(cmd *cobra.Command, list func(context.Context, *corev1client.CoreV1Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	cfg, err := o.config.ToRESTConfig()
	if err != nil {
		return failed(err)
	}
	c, err := corev1client.NewForConfig(cfg)
	if err != nil {
		return failed(err)
	}
	// Without a run there is no context.
	ctx, stop := context.WithTimeout(cmp.Or(cmd.Context(), context.Background()), completionTime)
	defer stop()
	words, err := list(ctx, c)
	if err != nil {
		return failed(err)
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

// failed shows an error where shells do not see it, for BASH_COMP_DEBUG_FILE.
func failed(err error) ([]string, cobra.ShellCompDirective) {
	cobra.CompErrorln(err.Error())
	return nil, cobra.ShellCompDirectiveError
}

// Complete prints what the last of the words may become.
func Complete(out, errOut io.Writer, words []string) error {
	cmd := Command(out, errOut)
	cmd.SetOut(out)
	cmd.SetErr(errOut)
	cmd.SetArgs(append([]string{cobra.ShellCompRequestCmd}, words...))
	return cmd.Execute()
}
