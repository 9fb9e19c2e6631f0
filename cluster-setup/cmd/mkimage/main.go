// Command mkimage builds the container images of the demos and tests. It only parses; package mkimage does the work.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/mkimage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	var builder mkimage.Builder
	var build string
	cmd := &cobra.Command{
		Use:           "mkimage [NAME...]",
		Short:         "build container images as archives to import; without names, all of them",
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, names []string) error {
			builder.Output = filepath.Join(build, "images")
			builder.Cache = filepath.Join(build, "images", "cache")
			builder.Bin = filepath.Join(build, "bin")
			if len(names) == 0 {
				var err error
				if names, err = builder.Names(); err != nil {
					return err
				}
			}
			return builder.BuildAll(cmd.Context(), names, func(image mkimage.Built) {
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s %s %.1fs\n", mkimage.Ref(image.Name), image.Digest, image.Archive, image.Took.Seconds())
			})
		},
	}
	cmd.Flags().StringVar(&builder.Sources, "sources", "cluster-setup/images", "folder of the images' descriptions")
	cmd.Flags().StringVar(&builder.Mirror, "mirror", "", "mirror of Debian (default: the one apt uses)")
	cmd.Flags().StringVar(&build, "build", ".build", "folder of build products")
	return cmd
}
