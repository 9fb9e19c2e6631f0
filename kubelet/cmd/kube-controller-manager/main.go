//go:build podmig_patched

// Command kube-controller-manager is upstream's, with ReplicaSets and endpoints that know
// of pods that move. The feature gate PodMigration turns the difference on.
package main

import (
	"os"
	_ "time/tzdata" // time zones of CronJobs

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"          // JSON log format
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // version metric
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"

	"podmig.dev/podmig/kubelet/manager"
)

func main() {
	manager.Install()
	os.Exit(cli.Run(app.NewControllerManagerCommand()))
}
