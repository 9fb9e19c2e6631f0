// Command localcluster runs Kubernetes clusters on one machine, each node in namespaces of its own.
//
// It only parses; package cluster does the work. Two hidden commands are the launcher and the first process of every machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/provider/netns"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

func main() {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case netns.LaunchCommand:
			exit(netns.Launch(os.Args[2]))
		case netns.InitCommand:
			exit(netns.Init(os.Args[2]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	exit(newCommand().ExecuteContext(ctx))
}

func exit(err error) {
	var ended *supervisor.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &ended):
		// The command has said itself what was wrong.
		os.Exit(ended.Code)
	default:
		fmt.Fprintln(os.Stderr, "localcluster:", err)
		os.Exit(1)
	}
}
