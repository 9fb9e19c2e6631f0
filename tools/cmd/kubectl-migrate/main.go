// Command kubectl-migrate moves a running pod to another node: kubectl migrate POD [NODE].
// It creates a PodMigration object, tells how far it is, and ends with a code that says
// how it ended.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"podmig.dev/podmig/tools/migrate"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := migrate.Command(os.Stdout, os.Stderr).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
	}
	var ended *migrate.EndedError
	switch {
	case errors.As(err, &ended):
		os.Exit(ended.Code())
	case err != nil:
		os.Exit(1)
	}
}
