// Command patchq assembles the patched upstream sources and keeps the patch queue in order.
//
// It is the command line of package tools/patchq; make calls it, and patches/README.md shows the edit loop.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"podmig.dev/podmig/tools/patchq"
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "patchq:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:           "patchq",
		Short:         "Assemble patched upstream sources and keep the patch queue in order",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.PersistentFlags().StringVar(&root, "root", ".", "folder of go.mod")
	repo := func() (patchq.Repo, error) {
		abs, err := filepath.Abs(root)
		if err != nil {
			return patchq.Repo{}, fmt.Errorf("find root: %w", err)
		}
		return patchq.Repo{Root: abs, Log: os.Stderr}, nil
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "assemble",
		Short: "Bring .build/src and .build/go.mod in line with go.mod and the queue",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := repo()
			if err != nil {
				return err
			}
			return r.Assemble()
		},
	})
	return cmd
}
