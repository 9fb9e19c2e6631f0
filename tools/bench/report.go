package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Move is one migration. Times are in seconds.
type Move struct {
	// Gap is the longest time between two answers that the client saw.
	Gap float64 `json:"gap"`
	// Total is from the creation of the clone to the end of the source.
	Total float64 `json:"total"`
	// Bytes crossed the network.
	Bytes float64 `json:"bytes"`
	// Phases are the kubelets' own figures; see the metric podmig_phase_duration_seconds.
	Phases map[string]float64 `json:"phases"`
}

// Bare is one criu dump, copy, criu restore.
type Bare struct {
	Dump    float64 `json:"dump"`
	Copy    float64 `json:"copy"`
	Restore float64 `json:"restore"`
}

// Sum of the three.
func (b Bare) Sum() float64 { return b.Dump + b.Copy + b.Restore }

// Size has everything that was measured with one amount of memory. The repetitions
// of the arms stand in the order in which they ran.
type Size struct {
	MB       int       `json:"mb"`
	Moves    []Move    `json:"moves"`
	Recreate []float64 `json:"recreateGaps"`
	Bare     []Bare    `json:"bare"`
}

// Result is what one run measured.
type Result struct {
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	Sizes  []Size `json:"sizes"`
}

// Spread is a sample's lowest, middle and highest value.
type Spread struct{ Min, Median, Max float64 }

func spread(values []float64) Spread {
	if len(values) == 0 {
		return Spread{}
	}
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	return Spread{v[0], (v[(n-1)/2] + v[n/2]) / 2, v[n-1]}
}

func (s Spread) String() string { return fmt.Sprintf("%.2f [%.2f %.2f]", s.Median, s.Min, s.Max) }

func each[T any](values []T, f func(T) float64) []float64 {
	out := make([]float64, 0, len(values))
	for _, v := range values {
		out = append(out, f(v))
	}
	return out
}

// ratios divides repetition by repetition: both ran next to each other.
func (s Size) ratios(other []float64) Spread {
	var out []float64
	for i, m := range s.Moves {
		if i < len(other) && other[i] > 0 {
			out = append(out, m.Gap/other[i])
		}
	}
	return spread(out)
}

func (s Size) bareSums() []float64 { return each(s.Bare, Bare.Sum) }

// WriteJSON writes everything that was measured.
func (r *Result) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// phases in the order in which they happen. The first four are parts of frozen.
var phases = []string{"create", "freeze", "dump", "final", "commit", "restore", "frozen"}

// WriteTable writes medians with the lowest and the highest value, times in seconds.
func (r *Result) WriteTable(w io.Writer) error {
	fmt.Fprintf(w, "seconds: median [lowest highest]; %d repetitions, arms interleaved; kernel %s, %d CPUs\n", r.repetitions(), r.Kernel, r.CPUs)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "MB\tgap\ttotal\tMB sent\trecreate gap\tbare criu\tgap/recreate\tgap/bare\t")
	for _, s := range r.Sizes {
		fmt.Fprintf(t, "%d\t%s\t%s\t%.1f\t%s\t%s\t%s\t%s\t\n", s.MB,
			spread(each(s.Moves, func(m Move) float64 { return m.Gap })),
			spread(each(s.Moves, func(m Move) float64 { return m.Total })),
			spread(each(s.Moves, func(m Move) float64 { return m.Bytes / 1e6 })).Median,
			spread(s.Recreate), spread(s.bareSums()), s.ratios(s.Recreate), s.ratios(s.bareSums()))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nphases of a move, median seconds")
	fmt.Fprintln(t, "MB\t"+strings.Join(phases, "\t")+"\tbare dump\tbare copy\tbare restore\t")
	for _, s := range r.Sizes {
		fmt.Fprintf(t, "%d\t", s.MB)
		for _, p := range phases {
			fmt.Fprintf(t, "%.3f\t", spread(each(s.Moves, func(m Move) float64 { return m.Phases[p] })).Median)
		}
		fmt.Fprintf(t, "%.3f\t%.3f\t%.3f\t\n", spread(each(s.Bare, func(b Bare) float64 { return b.Dump })).Median,
			spread(each(s.Bare, func(b Bare) float64 { return b.Copy })).Median,
			spread(each(s.Bare, func(b Bare) float64 { return b.Restore })).Median)
	}
	return t.Flush()
}

func (r *Result) repetitions() int {
	n := 0
	for _, s := range r.Sizes {
		n = max(n, len(s.Moves))
	}
	return n
}

// WriteSVG draws the gap over the amount of memory.
func (r *Result) WriteSVG(w io.Writer) error {
	p := plot.New()
	p.Title.Text = "How long a client waits"
	p.X.Label.Text = "memory of the pod, MB"
	p.Y.Label.Text = "seconds (median, lowest and highest)"
	p.Y.Min = 0
	p.Add(plotter.NewGrid())
	p.Legend.Top, p.Legend.Left = true, true
	curves := []struct {
		name string
		of   func(Size) []float64
	}{
		{"move", func(s Size) []float64 { return each(s.Moves, func(m Move) float64 { return m.Gap }) }},
		{"delete and recreate", func(s Size) []float64 { return s.Recreate }},
		{"bare criu dump, copy, restore", Size.bareSums},
	}
	for i, c := range curves {
		var points curve
		for _, s := range r.Sizes {
			if v := c.of(s); len(v) > 0 {
				sp := spread(v)
				points.XYs = append(points.XYs, plotter.XY{X: float64(s.MB), Y: sp.Median})
				points.bars = append(points.bars, struct{ Low, High float64 }{sp.Median - sp.Min, sp.Max - sp.Median})
			}
		}
		if len(points.XYs) == 0 {
			continue
		}
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		bars, err := plotter.NewYErrorBars(points)
		if err != nil {
			return err
		}
		line.Color, dots.Color, bars.Color = plotutil.Color(i), plotutil.Color(i), plotutil.Color(i)
		dots.Shape = plotutil.Shape(i)
		p.Add(line, dots, bars)
		p.Legend.Add(c.name, line, dots)
	}
	canvas := vgsvg.New(20*vg.Centimeter, 12*vg.Centimeter)
	p.Draw(draw.New(canvas))
	_, err := canvas.WriteTo(w)
	return err
}

// curve is a line with error bars.
type curve struct {
	plotter.XYs
	bars plotter.YErrors
}

func (c curve) YError(i int) (low, high float64) { return c.bars[i].Low, c.bars[i].High }
