// Command kubectl-checkpoint downloads a checkpoint of a running pod, which runs on:
// kubectl checkpoint POD PATH. Its exit code tells a refusal from a failure.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"podmig.dev/podmig/tools/checkpoint"
)

func main() {
	// An end by one of these removes what was downloaded so far.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := checkpoint.Command(os.Stdout, os.Stderr).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
	}
	os.Exit(checkpoint.ExitCode(err))
}
