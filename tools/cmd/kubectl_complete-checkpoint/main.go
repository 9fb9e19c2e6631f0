// Command kubectl_complete-checkpoint completes the words after kubectl checkpoint. kubectl
// looks for it under this name when a shell asks, and gives it the words so far; it answers
// as cobra does, with words and a last line :N that says what the shell may do with them.
package main

import (
	"fmt"
	"os"

	"podmig.dev/podmig/tools/checkpoint"
)

func main() {
	if err := checkpoint.Complete(os.Stdout, os.Stderr, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
