package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// startDNS runs the cluster's name server, when its binary was built.
func (c *Cluster) startDNS(ctx context.Context, out io.Writer) error {
	_, err := os.Stat(filepath.Join(c.state.Bin, "coredns"))
	if errors.Is(err, os.ErrNotExist) {
		fmt.Fprintf(out, "          NO cluster DNS: %s has no coredns\n", c.state.Bin)
		return nil
	}
	return err
}
