package kit

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"time"

	"podmig.dev/podmig/cluster-setup/manifests"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// Apply makes objects of any kind from YAML documents.
func (k *Kit) Apply(ctx context.Context, text string) error {
	var out bytes.Buffer
	err := k.Cluster.Kubectl(ctx, supervisor.Command{
		Args: []string{"-n", k.Namespace, "apply", "-f", "-"}, Stdin: strings.NewReader(text), Stdout: &out, Stderr: &out,
	})
	if err != nil {
		return fmt.Errorf("kubectl apply: %w: %s", err, strings.TrimSpace(out.String()))
	}
	return nil
}

// InstallController makes podmig's objects known and waits until their controller runs. Its
// image must be on the nodes.
func (k *Kit) InstallController(ctx context.Context) error {
	definitions, objects, err := manifests.Controller()
	if err != nil {
		return err
	}
	if err := k.Cluster.Apply(ctx, definitions); err != nil {
		return err
	}
	// kubectl wait takes a definition that has no conditions yet for an error.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := k.Kubectl(ctx, "get", "podmigrations,migratingpods")
		if err == nil {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the objects to be known: %w: %w", ctx.Err(), err)
		}
	}
	if err := k.Cluster.Apply(ctx, objects); err != nil {
		return err
	}
	if _, err := k.Kubectl(ctx, "-n", "podmig-system", "rollout", "status", "--timeout=60s", "deployment/podmig-controller"); err != nil {
		state, _ := k.Kubectl(ctx, "-n", "podmig-system", "get", "pods,events", "-o", "wide")
		log, _ := k.Kubectl(ctx, "-n", "podmig-system", "logs", "deployment/podmig-controller")
		return fmt.Errorf("%w\n%s\n%s", err, state, log)
	}
	return nil
}
