// Package completion is what kubectl's plugins share to complete words in a shell: flags with
// their functions, contexts, words that the API server is asked for, and the program that
// kubectl calls under the name kubectl_complete-PLUGIN.
package completion

import (
	"cmp"
	"context"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
)

// limit is for how long a shell waits for an API server that does not answer.
const limit = 5 * time.Second

// Register gives a flag its words. It panics for a flag that is not there or has some already.
func Register(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err)
	}
}

// Contexts completes --context with what the kubeconfig has.
func Contexts(cmd *cobra.Command, config genericclioptions.RESTClientGetter) {
	Register(cmd, "context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		cfg, err := config.ToRawKubeConfigLoader().RawConfig()
		if err != nil {
			return failed(err)
		}
		return slices.Sorted(maps.Keys(cfg.Contexts)), cobra.ShellCompDirectiveNoFileComp
	})
}

// Offer asks for words, for a few seconds at most. The shell picks those that begin as typed.
func Offer(cmd *cobra.Command, list func(context.Context) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	// Without a run there is no context.
	ctx, stop := context.WithTimeout(cmp.Or(cmd.Context(), context.Background()), limit)
	defer stop()
	words, err := list(ctx)
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

// Run prints what the last of the words after a command may become.
func Run(cmd *cobra.Command, out, errOut io.Writer, words []string) error {
	cmd.SetOut(out)
	cmd.SetErr(errOut)
	cmd.SetArgs(append([]string{cobra.ShellCompRequestCmd}, words...))
	return cmd.Execute()
}
