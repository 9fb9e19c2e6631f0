package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// globals are the flags of every command.
type globals struct {
	name string
	dir  string
}

func (g *globals) folder() string {
	if g.dir != "" {
		return g.dir
	}
	return filepath.Join(buildDir(), "cluster", g.name)
}

func (g *globals) load() (*cluster.Cluster, error) { return cluster.Load(g.folder()) }

// buildDir is the nearest .build above the working directory, so that the command works in every folder of a checkout.
func buildDir() string {
	dir, err := os.Getwd()
	if err != nil {
		return ".build"
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		candidate := filepath.Join(dir, ".build")
		if info, err := os.Stat(candidate); err == nil && info.IsDir() {
			return candidate
		}
	}
	return ".build"
}

func newCommand() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:           "localcluster",
		Short:         "Kubernetes clusters on one machine, each node in namespaces of its own",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&g.name, "name", "podmig", "name of the cluster")
	root.PersistentFlags().StringVar(&g.dir, "dir", "", "folder of the cluster (default .build/cluster/NAME)")
	root.AddCommand(upCommand(g), downCommand(g), statusCommand(g), logsCommand(g), execCommand(g), kubectlCommand(g),
		addNodeCommand(g), imagesCommand(g), killCommand(g), stopCommand(g), startCommand(g), linkCommand(g), pidCommand(g))
	return root
}

func upCommand(g *globals) *cobra.Command {
	var options cluster.Options
	var gates, nodeBin map[string]string
	cmd := &cobra.Command{
		Use:   "up",
		Short: "make a cluster and wait until its nodes are ready",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options.Name, options.Dir, options.Progress = g.name, g.folder(), cmd.OutOrStdout()
			options.NodeBin = nodeBin
			options.FeatureGates = map[string]bool{}
			for gate, value := range gates {
				on, err := strconv.ParseBool(value)
				if err != nil {
					return fmt.Errorf("feature gate %s: %q is neither true nor false", gate, value)
				}
				options.FeatureGates[gate] = on
			}
			if !cmd.Flags().Changed("image") {
				archives, err := filepath.Glob(filepath.Join(buildDir(), "images", "*.tar"))
				if err != nil {
					return fmt.Errorf("list images: %w", err)
				}
				options.Images = archives
			}
			_, err := cluster.Up(cmd.Context(), options)
			return err
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&options.Nodes, "nodes", 2, "number of nodes")
	flags.StringVar(&options.Bin, "bin", filepath.Join(buildDir(), "bin"), "folder of the binaries")
	flags.StringToStringVar(&nodeBin, "node-bin", nil, "other binaries for single nodes: NODE=FOLDER")
	flags.StringVar(&options.RootFS, "rootfs", filepath.Join(buildDir(), "image", "rootfs"), "unpacked node image")
	flags.StringToStringVar(&gates, "feature-gates", nil, "feature gates of all components: GATE=true|false")
	flags.StringSliceVar(&options.Images, "image", nil, "image archives to import (default all of .build/images)")
	flags.StringVar(&options.ProxyMode, "proxy-mode", "nftables", "how services are implemented: nftables or iptables")
	flags.BoolVar(&options.Audit, "audit", false, "write an audit log")
	flags.BoolVar(&options.Retain, "retain", false, "keep a cluster whose start failed")
	return cmd
}

func downCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "remove a cluster and everything it made, also what a crashed up left",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cluster.Down(cmd.Context(), g.name, g.folder())
		},
	}
}

func statusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "show machines and their components",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "MACHINE\tCOMPONENT\tSTATE\tHOST PID\tRESTARTS\tLAST EXIT")
			for _, machine := range append([]string{"hub"}, c.NodeNames()...) {
				m, err := c.Machine(machine)
				if err != nil {
					return err
				}
				components, err := m.Supervisor().Status(cmd.Context())
				if errors.Is(err, supervisor.ErrGone) {
					fmt.Fprintf(table, "%s\t-\tdown\t\t\t\n", machine)
					continue
				}
				if err != nil {
					return err
				}
				for _, one := range components {
					pid := "-"
					if one.PID != 0 {
						if number, err := m.HostPID(one.PID); err == nil {
							pid = strconv.Itoa(number)
						}
					}
					fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\n", machine, one.Name, one.State, pid, one.Restarts, one.LastExit)
				}
			}
			return table.Flush()
		},
	}
}

func logsCommand(g *globals) *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "logs MACHINE COMPONENT",
		Short: "show the log of a component (init is the machine itself)",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			m, err := c.Machine(args[0])
			if err != nil {
				return err
			}
			return showLog(cmd.Context(), cmd.OutOrStdout(), filepath.Join(m.Logs(), filepath.Base(args[1])+".log"), follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for more")
	return cmd
}

func execCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec MACHINE [--] COMMAND [ARGUMENT...]",
		Short: "run a command in a machine",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			command := args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return errors.New("name the command to run")
			}
			return c.Run(cmd.Context(), args[0], ownTerminal(supervisor.Command{Args: command}))
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func kubectlCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kubectl [ARGUMENT...]",
		Short: "run kubectl as the cluster's administrator",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			dir, err := os.Getwd()
			if err != nil {
				return fmt.Errorf("find working directory: %w", err)
			}
			return c.Kubectl(cmd.Context(), ownTerminal(supervisor.Command{Args: args, Dir: dir}))
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// ownTerminal connects a command to this process's files and passes signals on.
func ownTerminal(command supervisor.Command) supervisor.Command {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGHUP, unix.SIGQUIT, unix.SIGWINCH)
	command.Stdin, command.Stdout, command.Stderr, command.Signals = os.Stdin, os.Stdout, os.Stderr, signals
	return command
}

func addNodeCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "add-node",
		Short: "add a node to a running cluster",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			name, err := c.AddNode(cmd.Context(), cmd.OutOrStdout())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), name)
			return nil
		},
	}
}

func imagesCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "images", Short: "work with container images"}
	cmd.AddCommand(&cobra.Command{
		Use:   "load ARCHIVE...",
		Short: "import image archives on all nodes",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			return c.LoadImages(cmd.Context(), args)
		},
	})
	return cmd
}

func killCommand(g *globals) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "kill MACHINE COMPONENT",
		Short: "send a signal to exactly one component, which is started again",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			number := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG"))
			if number == 0 {
				return fmt.Errorf("no signal is called %q", name)
			}
			client, err := g.supervisor(args[0])
			if err != nil {
				return err
			}
			return client.Kill(cmd.Context(), args[1], number)
		},
	}
	cmd.Flags().StringVarP(&name, "signal", "s", "KILL", "name of the signal")
	return cmd
}

func stopCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "stop MACHINE COMPONENT",
		Short: "end a component and leave it stopped",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.supervisor(args[0])
			if err != nil {
				return err
			}
			return client.Stop(cmd.Context(), args[1])
		},
	}
}

func startCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "start MACHINE COMPONENT",
		Short: "start a stopped component",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.supervisor(args[0])
			if err != nil {
				return err
			}
			return client.Start(cmd.Context(), args[1])
		},
	}
}

func (g *globals) supervisor(machine string) (supervisor.Client, error) {
	c, err := g.load()
	if err != nil {
		return supervisor.Client{}, err
	}
	m, err := c.Machine(machine)
	if err != nil {
		return supervisor.Client{}, err
	}
	return m.Supervisor(), nil
}

func linkCommand(g *globals) *cobra.Command {
	var peer string
	cmd := &cobra.Command{
		Use:   "link NODE up|down",
		Short: "plug or unplug the network cable of a node, or cut only its way to another node",
		Args:  cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			if args[1] != "up" && args[1] != "down" {
				return fmt.Errorf("a link goes up or down, not %q", args[1])
			}
			c, err := g.load()
			if err != nil {
				return err
			}
			if peer != "" {
				return c.SetLinkBetween(args[0], peer, args[1] == "up")
			}
			return c.SetLink(args[0], args[1] == "up")
		},
	}
	cmd.Flags().StringVar(&peer, "peer", "", "cut only the way to this node; the API server stays reachable")
	return cmd
}

func pidCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "pid MACHINE [COMPONENT]",
		Short: "print the host's process number of a component, or of the machine's first process",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			m, err := c.Machine(args[0])
			if err != nil {
				return err
			}
			var pid int
			if len(args) == 1 {
				pid, err = m.InitPID()
			} else {
				pid, err = c.ComponentPID(cmd.Context(), args[0], args[1])
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), pid)
			return nil
		},
	}
}
