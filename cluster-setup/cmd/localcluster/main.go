// Command localcluster runs Kubernetes clusters on one machine, each node in namespaces of its own.
//
// It only parses; package cluster does the work. It is also the launcher and the first process of every machine.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

func main() {
	if machine, err := netns.Main(os.Args); machine {
		exit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	exit(newCommand().ExecuteContext(ctx))
}

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	// A command that ran for the user, and only such a command, has said itself what was wrong. Errors around it have not been
	// told, so this looks at the outermost one only.
	if ended, ok := err.(*supervisor.ExitError); ok {
		os.Exit(ended.Code)
	}
	fmt.Fprintln(os.Stderr, "localcluster:", err)
	os.Exit(1)
}
