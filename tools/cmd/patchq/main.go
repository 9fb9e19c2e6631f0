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
	if err := newCommand().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "patchq:", err)
		os.Exit(1)
	}
}

// globals are the flags that every command has.
type globals struct{ root string }

func (g *globals) repo() (patchq.Repo, error) {
	abs, err := filepath.Abs(g.root)
	if err != nil {
		return patchq.Repo{}, fmt.Errorf("find root: %w", err)
	}
	return patchq.Repo{Root: abs, Log: os.Stderr}, nil
}

// upstream returns the checkout and the upstream that an argument names.
func (g *globals) upstream(name string) (patchq.Repo, patchq.Upstream, error) {
	u, err := patchq.FindUpstream(name)
	if err != nil {
		return patchq.Repo{}, u, err
	}
	r, err := g.repo()
	return r, u, err
}

func newCommand() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:           "patchq",
		Short:         "Assemble patched upstream sources and keep the patch queue in order",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&g.root, "root", ".", "folder of go.mod")
	root.AddCommand(assembleCommand(g), openCommand(g), saveCommand(g), refreshCommand(g), checkCommand(g),
		driftCommand(g), testsCommand(g))
	return root
}

func assembleCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "assemble",
		Short: "Bring .build/src and .build/go.mod in line with go.mod and the queue",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := g.repo()
			if err != nil {
				return err
			}
			return r.Assemble()
		},
	}
}

// dirFlag gives a command the folder of the scratch repository.
func dirFlag(cmd *cobra.Command, dir *string) *cobra.Command {
	cmd.Flags().StringVar(dir, "dir", "", "folder of the scratch repository (default .build/open/UPSTREAM)")
	return cmd
}

func scratch(r patchq.Repo, u patchq.Upstream, dir string) (string, error) {
	if dir == "" {
		return r.OpenDir(u), nil
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("find scratch repository: %w", err)
	}
	return abs, nil
}

func openCommand(g *globals) *cobra.Command {
	var dir string
	return dirFlag(&cobra.Command{
		Use:   "open UPSTREAM",
		Short: "Make a scratch git repository with the queue as commits",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, u, err := g.upstream(args[0])
			if err != nil {
				return err
			}
			d, err := scratch(r, u, dir)
			if err != nil {
				return err
			}
			if err := r.Open(u, d); err != nil {
				return err
			}
			fmt.Printf("opened %s in %s: edit, commit (or git rebase -i base), then save\n", u.Name, d)
			return nil
		},
	}, &dir)
}

func saveCommand(g *globals) *cobra.Command {
	var dir string
	return dirFlag(&cobra.Command{
		Use:   "save UPSTREAM",
		Short: "Write the commits of the scratch repository back to the queue",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, u, err := g.upstream(args[0])
			if err != nil {
				return err
			}
			d, err := scratch(r, u, dir)
			if err != nil {
				return err
			}
			saved, err := r.Save(u, d)
			printSaved(u, saved, err)
			return err
		},
	}, &dir)
}

func refreshCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "refresh UPSTREAM",
		Short: "Rewrite the patch files of hand-edited patches: line numbers, hashes, format",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, u, err := g.upstream(args[0])
			if err != nil {
				return err
			}
			saved, err := r.Refresh(u)
			printSaved(u, saved, err)
			return err
		},
	}
}

func printSaved(u patchq.Upstream, saved patchq.Saved, err error) {
	for _, n := range saved.Written {
		fmt.Printf("wrote patches/%s/%s\n", u.Name, n)
	}
	for _, n := range saved.Removed {
		fmt.Printf("removed patches/%s/%s\n", u.Name, n)
	}
	if err == nil && len(saved.Written)+len(saved.Removed) == 0 {
		fmt.Printf("patches/%s is unchanged\n", u.Name)
	}
}

func checkCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Lint, apply without offset, round trip, dead patches, unused hooks",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := g.repo()
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
}

// printReports shows the size of every queue with its faults.
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

func driftCommand(g *globals) *cobra.Command {
	var version, upstream string
	cmd := &cobra.Command{
		Use:   "drift --version VERSION",
		Short: "Report how a queue would apply to another version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, u, err := g.upstream(upstream)
			if err != nil {
				return err
			}
			if version == "" {
				return fmt.Errorf("say which version: --version v1.36.3")
			}
			drifted, err := r.Drift(u, version)
			if err != nil {
				return err
			}
			for _, d := range drifted {
				fmt.Printf("%-9s  %s\n", d.Outcome, d.Patch.Name)
				if d.Detail != "" {
					fmt.Printf("           %s\n", d.Detail)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&version, "version", "", "version to compare with, such as v1.36.3")
	cmd.Flags().StringVar(&upstream, "upstream", "kubernetes", "whose queue")
	return cmd
}

func testsCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "tests",
		Short: "List the upstream packages that the queue says must stay green",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := g.repo()
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
}
