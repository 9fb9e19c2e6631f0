package agent

import (
	"time"

	"k8s.io/component-base/metrics"

	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/migration"
)

// Metrics are what the agent tells Prometheus. Register adds them to a registry.
type Metrics struct {
	// Running counts the migrations that are under way, by side.
	Running *metrics.GaugeVec
	// Ended counts the migrations that are over, by side and outcome: the terminal
	// state of the engine.
	Ended *metrics.CounterVec
	// Bytes counts bytes of checkpoints, by direction.
	Bytes *metrics.CounterVec
	// Refused counts requests of other nodes that were answered no, by verb and code.
	Refused *metrics.CounterVec
	// Phase observes how long a phase took, in seconds.
	Phase *metrics.HistogramVec
}

const subsystem = "podmig"

// NewMetrics returns metrics that are registered nowhere.
func NewMetrics() *Metrics {
	// From what a move of an empty pod costs to what a deadline allows.
	buckets := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120}
	return &Metrics{
		Running: metrics.NewGaugeVec(&metrics.GaugeOpts{
			Subsystem: subsystem, Name: "migrations_running", StabilityLevel: metrics.ALPHA,
			Help: "Migrations that are under way, by side (source or target).",
		}, []string{"side"}),
		Ended: metrics.NewCounterVec(&metrics.CounterOpts{
			Subsystem: subsystem, Name: "migrations_total", StabilityLevel: metrics.ALPHA,
			Help: "Migrations that are over, by side and outcome.",
		}, []string{"side", "outcome"}),
		Bytes: metrics.NewCounterVec(&metrics.CounterOpts{
			Subsystem: subsystem, Name: "checkpoint_bytes_total", StabilityLevel: metrics.ALPHA,
			Help: "Bytes of checkpoints that crossed the network, by direction (sent or received).",
		}, []string{"direction"}),
		Refused: metrics.NewCounterVec(&metrics.CounterOpts{
			Subsystem: subsystem, Name: "requests_refused_total", StabilityLevel: metrics.ALPHA,
			Help: "Requests of other nodes that were answered no, by verb and code. Codes forbidden, unknown-caller and insecure deserve a look.",
		}, []string{"verb", "code"}),
		Phase: metrics.NewHistogramVec(&metrics.HistogramOpts{
			Subsystem: subsystem, Name: "phase_duration_seconds", StabilityLevel: metrics.ALPHA, Buckets: buckets,
			Help: "Duration of the phases of a migration. On the source: freeze (until every container stood still), dump (CRIU). On the target: create (sandbox, volumes, containers), final (from the request to freeze to the verified checkpoint), commit, restore, and frozen (from the request to freeze to the resumed clone).",
		}, []string{"phase"}),
	}
}

// All are the collectors to register.
func (m *Metrics) All() []metrics.Registerable {
	return []metrics.Registerable{m.Running, m.Ended, m.Bytes, m.Refused, m.Phase}
}

func (m *Metrics) sourceBegan() { m.Running.WithLabelValues("source").Inc() }
func (m *Metrics) targetBegan() { m.Running.WithLabelValues("target").Inc() }

func (m *Metrics) sourceEnded(s migration.SourceState) {
	m.Running.WithLabelValues("source").Dec()
	m.Ended.WithLabelValues("source", string(s)).Inc()
}

func (m *Metrics) targetEnded(s migration.TargetState) {
	m.Running.WithLabelValues("target").Dec()
	m.Ended.WithLabelValues("target", string(s)).Inc()
}

func (m *Metrics) phase(name string, d time.Duration) {
	m.Phase.WithLabelValues(name).Observe(d.Seconds())
}

func (m *Metrics) frozen(r *cri.FreezeCheckpointResponse) {
	m.Phase.WithLabelValues("freeze").Observe(time.Duration(r.FreezeDuration).Seconds())
	m.Phase.WithLabelValues("dump").Observe(time.Duration(r.DumpDuration).Seconds())
}

func (m *Metrics) sent(n uint64)     { m.Bytes.WithLabelValues("sent").Add(float64(n)) }
func (m *Metrics) received(n uint64) { m.Bytes.WithLabelValues("received").Add(float64(n)) }
