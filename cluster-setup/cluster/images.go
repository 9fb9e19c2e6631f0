package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"podmig.dev/podmig/cluster-setup/supervisor"
)

// LoadImages imports archives on all nodes.
func (c *Cluster) LoadImages(ctx context.Context, archives []string) error {
	return c.importAll(ctx, c.NodeNames(), archives)
}

// importOrSkip imports the cluster's images on nodes that did not begin with them, and stores them for the next time.
func (c *Cluster) importOrSkip(ctx context.Context, nodes []string, seeded bool) error {
	if seeded || len(c.state.Images) == 0 {
		return nil
	}
	if err := c.importAll(ctx, nodes, c.state.Images); err != nil {
		return err
	}
	return c.keep(ctx, nodes[0])
}

func (c *Cluster) importAll(ctx context.Context, nodes, archives []string) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, node := range nodes {
		group.Go(func() error {
			for _, archive := range archives {
				if err := c.importOne(ctx, node, archive); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func (c *Cluster) importOne(ctx context.Context, node, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	defer file.Close()
	var out strings.Builder
	err = c.Run(ctx, node, supervisor.Command{
		Args:  []string{"ctr", "--namespace", "k8s.io", "images", "import", "--local", "-"},
		Stdin: file, Stdout: &out, Stderr: &out,
	})
	if err != nil {
		return fmt.Errorf("import %s on %s: %w: %s", filepath.Base(archive), node, err, strings.TrimSpace(out.String()))
	}
	return nil
}
