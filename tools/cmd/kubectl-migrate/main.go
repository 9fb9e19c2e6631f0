// Command kubectl-migrate moves a running pod to another node: kubectl migrate POD [NODE],
// or all pods of a node: kubectl migrate --from NODE. It creates PodMigration objects,
// tells how far they are, and ends with a code that says how they ended.
package main

import (
	"context"
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
	os.Exit(migrate.ExitCode(err))
}
