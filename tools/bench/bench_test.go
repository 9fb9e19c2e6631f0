package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func result() *Result {
	return &Result{Kernel: "6.18", CPUs: 2, Sizes: []Size{
		{
			MB: 0, Moves: []Move{{Gap: .2, Total: 1, Bytes: 1e6, Phases: map[string]float64{"dump": .1}}, {Gap: .4, Total: 1}},
			Recreate: []float64{2, 2}, Bare: []Bare{{.1, .1, .2}, {.1, .1, .2}},
		},
		{MB: 500, Moves: []Move{{Gap: 3}}, Recreate: []float64{1.5}, Bare: []Bare{{1, .5, .5}}},
	}}
}

func TestSpread(t *testing.T) {
	tests := []struct {
		name   string
		values []float64
		want   Spread
	}{
		{"none", nil, Spread{}},
		{"one", []float64{3}, Spread{3, 3, 3}},
		{"odd", []float64{9, 1, 5}, Spread{1, 5, 9}},
		{"even", []float64{4, 1, 2, 9}, Spread{1, 3, 9}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := spread(tt.values); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// Ratios are of neighbours in time, not of medians.
func TestRatiosPairRepetitions(t *testing.T) {
	s := Size{Moves: []Move{{Gap: 1}, {Gap: 8}}, Recreate: []float64{1, 2}}
	if got := s.ratios(s.Recreate); got != (Spread{1, 2.5, 4}) {
		t.Errorf("got %+v", got)
	}
}

func TestReports(t *testing.T) {
	r := result()
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var back Result
	if err := json.Unmarshal(b.Bytes(), &back); err != nil || !reflect.DeepEqual(&back, r) {
		t.Errorf("JSON does not come back as it was: %v\n%s", err, b.String())
	}
	b.Reset()
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"0.30 [0.20 0.40]", "1.50 [1.50 1.50]", "kernel 6.18, 2 CPUs"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
	b.Reset()
	if err := r.WriteSVG(&b); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(&b)
	texts := 0
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
		if s, ok := tok.(xml.StartElement); ok && s.Name.Local == "text" {
			texts++
		}
	}
	if texts < 6 {
		t.Errorf("the plot has %d texts", texts)
	}
}

// A server that is silent for a second is a gap of a second, whichever address
// answers afterwards.
func TestClientSeesTheGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		open := map[string]bool{"old": true}
		c, ctx := newClient(t.Context(), func(_ context.Context, _, address string) (net.Conn, error) {
			here, there := net.Pipe()
			go func() {
				buffer := make([]byte, 16)
				for {
					if _, err := there.Read(buffer); err != nil {
						return
					}
					if open[address] {
						if _, err := there.Write([]byte("!")); err != nil {
							return
						}
					}
				}
			}()
			return here, nil
		})
		if err := errors.Join(c.ask(ctx, "old"), c.ask(ctx, "new"), c.ask(ctx, "new")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		if g := c.gap.Longest(); g > 2*time.Millisecond {
			t.Errorf("gap of %s while the server answered", g)
		}
		open["old"] = false
		time.Sleep(time.Second)
		open["new"] = true
		if err := c.gap.After(ctx, time.Now()); err != nil {
			t.Fatal(err)
		}
		if g := c.gap.Longest(); g < time.Second || g > 1010*time.Millisecond {
			t.Errorf("gap of %s, want about a second", g)
		}
		c.close()
	})
}
