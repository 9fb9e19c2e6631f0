package checkpoint

import (
	"fmt"
	"io"
	"time"
)

// interval is how often a download says how far it is.
const interval = 2 * time.Second

// progress counts what is written to it and tells now and then.
type progress struct {
	out         io.Writer
	total, n    int64
	began, last time.Time
}

func (p *progress) Write(b []byte) (int, error) {
	p.n += int64(len(b))
	if now := time.Now(); now.Sub(p.began) >= interval && now.Sub(p.last) >= interval && p.n < p.total {
		p.last = now
		p.print()
	}
	return len(b), nil
}

func (p *progress) print() {
	took := time.Since(p.began)
	rate := float64(p.n) / max(took.Seconds(), 0.001)
	fmt.Fprintf(p.out, "%6.1fs  %s of %s, %s/s\n", took.Seconds(), size(p.n), size(p.total), size(int64(rate)))
}

// size is a number of bytes for people.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/(1<<10), 0
	for v >= 1<<10 && i < len(units)-1 {
		v, i = v/(1<<10), i+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}
