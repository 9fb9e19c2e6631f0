// Command nodeimage builds the image of a node. It only parses; package nodeimage does the work.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/nodeconfig"
	"podmig.dev/podmig/cluster-setup/nodeimage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "nodeimage:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	var builder nodeimage.Builder
	var build, driver string
	var gate bool
	root := &cobra.Command{
		Use:           "nodeimage",
		Short:         "build the image of a node",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRun: func(*cobra.Command, []string) {
			builder.Dir, builder.Bin = filepath.Join(build, "image"), filepath.Join(build, "bin")
			builder.Values = nodeconfig.Values{PauseImage: cluster.PauseImage, CgroupDriver: driver}
			if gate {
				builder.Values.FeatureGates = map[string]bool{"PodMigration": true}
			}
		},
	}
	root.PersistentFlags().StringVar(&build, "build", ".build", "folder of build products")
	root.PersistentFlags().StringVar(&builder.Mirror, "mirror", "", "mirror of Debian (default: the one apt uses)")
	image := &cobra.Command{
		Use:   "build",
		Short: "make the root file system tarball and the OCI image, binaries included",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			made, err := builder.Build(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n%s %s\n", made.TarballDigest, made.Tarball, made.Digest, made.Archive)
			return nil
		},
	}
	image.Flags().StringVar(&driver, "cgroup-driver", "systemd", "who manages control groups on the host: systemd or cgroupfs")
	image.Flags().BoolVar(&gate, "pod-migration", true, "switch the feature gate PodMigration on in the kubelet's configuration")
	root.AddCommand(image, &cobra.Command{
		Use:   "rootfs",
		Short: "make the unpacked Debian part that the local cluster uses",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			link, err := builder.RootFS(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), link)
			return nil
		},
	})
	return root
}
