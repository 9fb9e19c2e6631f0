package cluster

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"podmig.dev/podmig/cluster-setup/manifests"
)

// startDNS runs the cluster's name server when its image is among the imported ones.
func (c *Cluster) startDNS(ctx context.Context, out io.Writer) error {
	if !slices.ContainsFunc(c.state.Images, func(archive string) bool { return filepath.Base(archive) == "coredns.tar" }) {
		fmt.Fprintln(out, "          NO cluster DNS: coredns.tar is not among the images (mkimage coredns makes it)")
		return nil
	}
	if err := c.Apply(ctx, manifests.DNS(dnsService.String(), domain)); err != nil {
		return err
	}
	return c.kubectlQuiet(ctx, "", "--namespace=kube-system", "rollout", "status", "deployment/coredns", "--timeout="+dnsTimeout.String())
}
