// Command podmig-build brings .build/bin up to date. It is what `make build` calls; package tools/build does the work.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"podmig.dev/podmig/tools/build"
	"podmig.dev/podmig/tools/patchq"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		stop()
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var root, only string
	var force bool
	cmd := &cobra.Command{
		Use:           "podmig-build",
		Short:         "Assemble the patched sources and compile everything into .build/bin",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			abs, err := filepath.Abs(root)
			if err != nil {
				return fmt.Errorf("find root: %w", err)
			}
			return build.Run(cmd.Context(), build.Options{Repo: patchq.Repo{Root: abs, Log: os.Stderr}, Force: force, Only: only})
		},
	}
	cmd.Flags().StringVar(&root, "root", ".", "folder of go.mod")
	cmd.Flags().StringVar(&only, "only", "", "run one step: podmig, containerd, kubernetes, cni, etcd, runc, coredns or faults")
	cmd.Flags().BoolVar(&force, "force", false, "ask the Go tool even if no input changed")
	return cmd
}
