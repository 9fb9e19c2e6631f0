//go:build podmig_patched

// Command kubelet is upstream's kubelet that can move pods. It takes upstream's
// flags and configuration; the feature gate PodMigration turns the difference on.
package main

import (
	"context"
	"os"

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"          // JSON log format
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // version metric
	"k8s.io/kubernetes/cmd/kubelet/app"

	"podmig.dev/podmig/kubelet/inject"
)

func main() {
	inject.Install()
	os.Exit(cli.Run(app.NewKubeletCommand(context.Background())))
}
