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
	var root, dir string
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
	upstream := func(args []string) (patchq.Repo, patchq.Upstream, string, error) {
		r, err := repo()
		if err != nil {
			return r, patchq.Upstream{}, "", err
		}
		u, err := patchq.FindUpstream(args[0])
		if err != nil {
			return r, u, "", err
		}
		d := r.OpenDir(u)
		if dir != "" {
			d, err = filepath.Abs(dir)
		}
		return r, u, d, err
	}
	open := &cobra.Command{
		Use:   "open UPSTREAM",
		Short: "Make a scratch git repository with the queue as commits",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, u, d, err := upstream(args)
			if err != nil {
				return err
			}
			if err := r.Open(u, d); err != nil {
				return err
			}
			fmt.Printf("opened %s in %s: edit, commit (or git rebase -i base), then save\n", u.Name, d)
			return nil
		},
	}
	save := &cobra.Command{
		Use:   "save UPSTREAM",
		Short: "Write the commits of the scratch repository back to the queue",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, u, d, err := upstream(args)
			if err != nil {
				return err
			}
			saved, err := r.Save(u, d)
			report(u, saved)
			return err
		},
	}
	for _, c := range []*cobra.Command{open, save} {
		c.Flags().StringVar(&dir, "dir", "", "folder of the scratch repository (default .build/open/UPSTREAM)")
	}
	refresh := &cobra.Command{
		Use:   "refresh UPSTREAM",
		Short: "Rewrite the patch files of hand-edited patches: line numbers, hashes, format",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, u, _, err := upstream(args)
			if err != nil {
				return err
			}
			saved, err := r.Refresh(u)
			report(u, saved)
			return err
		},
	}
	check := &cobra.Command{
		Use:   "check",
		Short: "Lint, apply without offset, round trip, dead patches, unused hooks",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := repo()
			if err != nil {
				return err
			}
			reports, err := r.Check()
			if err != nil {
				return err
			}
			return printReports(reports)
		},
	}
	tests := &cobra.Command{
		Use:   "tests",
		Short: "List the upstream packages that the queue says must stay green",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := repo()
			if err != nil {
				return err
			}
			packages, err := r.TestPackages()
			for _, p := range packages {
				fmt.Println(p)
			}
			return err
		},
	}
	var version, only string
	drift := &cobra.Command{
		Use:   "drift",
		Short: "Report how a queue would apply to another version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := repo()
			if err != nil {
				return err
			}
			u, err := patchq.FindUpstream(only)
			if err != nil {
				return err
			}
			drifted, err := r.Drift(u, version)
			if err != nil {
				return err
			}
			for _, d := range drifted {
				fmt.Printf("%-9s  %s", d.Outcome, d.Patch.Name)
				if d.Detail != "" {
					fmt.Printf("\n           %s", d.Detail)
				}
				fmt.Println()
			}
			return nil
		},
	}
	drift.Flags().StringVar(&version, "version", "", "version to compare with, such as v1.36.3")
	drift.Flags().StringVar(&only, "upstream", "kubernetes", "whose queue")
	if err := drift.MarkFlagRequired("version"); err != nil {
		panic(err)
	}
	cmd.AddCommand(open, save, refresh, check, tests, drift)
	return cmd
}

// printReports shows the size of every queue, then the faults.
func printReports(reports []patchq.Report) error {
	faults := 0
	for _, r := range reports {
		lines, files := 0, 0
		for _, p := range r.Patches {
			if !p.Generated() {
				l, f := p.Footprint()
				lines, files = lines+l, files+f
			}
		}
		fmt.Printf("%-10s %s: %d patches, %d lines in %d existing files\n", r.Upstream.Name, r.Version, len(r.Patches), lines, files)
		for _, f := range r.Faults {
			fmt.Printf("  %s\n", f)
			faults++
		}
	}
	if faults > 0 {
		return fmt.Errorf("%d faults in the patch queues", faults)
	}
	return nil
}

func report(u patchq.Upstream, saved patchq.Saved) {
	for _, n := range saved.Written {
		fmt.Printf("wrote patches/%s/%s\n", u.Name, n)
	}
	for _, n := range saved.Removed {
		fmt.Printf("removed patches/%s/%s\n", u.Name, n)
	}
	if len(saved.Written)+len(saved.Removed) == 0 {
		fmt.Printf("patches/%s is unchanged\n", u.Name)
	}
}
