// Command migration-bench measures how long a pod is away when it moves, beside
// deleting and recreating it and beside bare CRIU, in one interleaved run. It makes a
// cluster of its own and removes it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/tools/bench"
)

func main() {
	// The first process of every machine of the cluster is this program, too.
	if machine, err := netns.Main(os.Args); machine {
		if err != nil {
			fmt.Fprintln(os.Stderr, "migration-bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "migration-bench:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	o := bench.Options{}
	var out, existing string
	cmd := &cobra.Command{
		Use:           "migration-bench",
		Short:         "measure how long a pod is away when it moves",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Progress = cmd.OutOrStdout()
			return run(cmd.Context(), o, out, existing)
		},
	}
	f := cmd.Flags()
	f.IntSliceVar(&o.Sizes, "sizes", []int{0, 100, 250, 500, 1000, 2500}, "memory of the pod in MB")
	f.IntVar(&o.Repetitions, "repetitions", 5, "repetitions of each arm at each size")
	f.StringVar(&o.Ballast, "ballast", ".build/bench/ballast", "program of the ballast pod")
	f.StringVar(&out, "out", ".build/bench", "folder for result.json and gap.svg")
	f.StringVar(&existing, "cluster", "", "folder of a running cluster to measure on instead of making one")
	return cmd
}

func run(ctx context.Context, o bench.Options, out, existing string) (err error) {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	c, down, err := provide(ctx, o, existing)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, down()) }()
	k, err := kit.New(c, "")
	if err != nil {
		return err
	}
	if k, err = k.In(ctx, "bench"); err != nil {
		return err
	}
	b, err := bench.New(k, o)
	if err != nil {
		return err
	}
	r, err := b.Run(ctx)
	if err != nil {
		return err
	}
	if err := write(filepath.Join(out, "result.json"), func(f *os.File) error { return r.WriteJSON(f) }); err != nil {
		return err
	}
	if err := write(filepath.Join(out, "gap.svg"), func(f *os.File) error { return r.WriteSVG(f) }); err != nil {
		return err
	}
	fmt.Fprintln(o.Progress)
	if err := r.WriteTable(o.Progress); err != nil {
		return err
	}
	fmt.Fprintf(o.Progress, "\nwritten to %s: result.json, gap.svg\n", out)
	return nil
}

// provide makes the cluster, or finds the one that exists.
func provide(ctx context.Context, o bench.Options, existing string) (*cluster.Cluster, func() error, error) {
	if existing != "" {
		c, err := cluster.Load(existing)
		return c, func() error { return nil }, err
	}
	var images []string
	for _, name := range []string{"pause", "coredns", "ballast"} {
		images = append(images, filepath.Join(".build/images", name+".tar"))
	}
	co := cluster.Options{
		Name: "bench", Dir: ".build/cluster/bench", Bin: ".build/bin", RootFS: ".build/image/rootfs",
		Nodes: 2, Images: images, ProxyMode: "nftables", Progress: o.Progress,
	}
	// What an interrupted run has left behind goes first.
	if err := cluster.Down(ctx, co.Name, co.Dir); err != nil && !errors.Is(err, cluster.ErrNoCluster) {
		return nil, nil, err
	}
	c, err := cluster.Up(ctx, co)
	return c, func() error { return cluster.Down(context.WithoutCancel(ctx), co.Name, co.Dir) }, err
}

func write(path string, f func(*os.File) error) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := f(file); err != nil {
		file.Close()
		return fmt.Errorf("write %s: %w", path, err)
	}
	return file.Close()
}
