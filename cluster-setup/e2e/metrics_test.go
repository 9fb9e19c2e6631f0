//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/tools/clone"
)

// metrics reads a kubelet's figures of migrations, by name and labels. Of a histogram it
// is the number of observations.
func metrics(ctx context.Context, k *kit.Kit, node string) (map[string]float64, error) {
	text, err := k.Client.CoreV1().RESTClient().Get().AbsPath("/api/v1/nodes", node, "proxy/metrics").DoRaw(ctx)
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(text)))
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for name, f := range families {
		if !strings.HasPrefix(name, "podmig_") {
			continue
		}
		for _, m := range f.Metric {
			key := name
			for _, l := range m.Label {
				key += " " + l.GetValue()
			}
			out[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out, nil
}

// A move shows in the metrics of both kubelets.
func TestMetrics(t *testing.T) {
	ctx, k := begin(t, 2*time.Minute)
	if err := k.Create(ctx, fmt.Sprintf(countingPod, "counted")); err != nil {
		t.Fatal(err)
	}
	if _, err := k.WaitRunning(ctx, "counted"); err != nil {
		t.Fatal(err)
	}
	before := map[string]map[string]float64{}
	for _, node := range []string{node1, node2} {
		var err error
		if before[node], err = metrics(ctx, k, node); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.Move(ctx, "counted", clone.Options{Name: "counted-1", Node: node2}); err != nil {
		t.Fatal(err)
	}
	grows := map[string][]string{
		node1: {"podmig_migrations_total Released source", "podmig_checkpoint_bytes_total sent", "podmig_phase_duration_seconds freeze", "podmig_phase_duration_seconds dump"},
		node2: {"podmig_migrations_total Done target", "podmig_checkpoint_bytes_total received", "podmig_phase_duration_seconds restore"},
	}
	until(ctx, t, "both kubelets have counted it", func() error {
		for node, names := range grows {
			now, err := metrics(ctx, k, node)
			if err != nil {
				return err
			}
			for _, name := range names {
				if now[name] <= before[node][name] {
					return fmt.Errorf("%s on %s is %v and was %v; there are %v", name, node, now[name], before[node][name], now)
				}
			}
			for _, side := range []string{"source", "target"} {
				if n := now["podmig_migrations_running "+side]; n != 0 {
					return fmt.Errorf("%v migrations run on %s", n, node)
				}
			}
		}
		return nil
	})
}
