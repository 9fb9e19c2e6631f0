package service

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/cri-api/migration/migrationtest"
	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

func TestPace(t *testing.T) {
	type round struct {
		pages uint64
		took  time.Duration
	}
	const many = 100 * enoughPages
	for _, tt := range []struct {
		name   string
		budget time.Duration
		rounds []round
		// after is how many rounds there are.
		after int
		late  time.Duration
	}{
		{"an idle pod", 0, []round{{many, time.Second}, {0, 0}}, 2, 0},
		{"little from the beginning", 0, []round{{enoughPages, time.Second}}, 1, 0},
		{"it shrinks", 0, []round{{many, 8 * time.Second}, {many / 2, 4 * time.Second}, {many / 4, 2 * time.Second}, {1, 0}}, 4, 0},
		{"it does not shrink", 0, []round{{many, time.Second}, {many, time.Second}}, 2, 0},
		{"eight at most", 0, []round{{many, 1}, {many / 2, 1}, {many / 4, 1}, {many / 8, 1}, {many / 16, 1}, {many / 32, 1}, {many / 64, 1}, {many / 90, 1}}, 8, 0},
		// It writes a quarter of what is sent in the same time.
		{"it fits the budget", time.Second, []round{{many, 8 * time.Second}, {many / 4, 2 * time.Second}}, 2, 0},
		{"it fits the budget later", 200 * time.Millisecond, []round{{many, 8 * time.Second}, {many / 4, 2 * time.Second}, {many / 16, 500 * time.Millisecond}}, 3, 0},
		{"it never fits the budget", 200 * time.Millisecond, []round{{many, time.Second}, {many, time.Second}}, 2, time.Second},
		{"nearly as fast as it is sent", 500 * time.Millisecond, []round{{many, 1000 * time.Millisecond}, {many * 9 / 10, 900 * time.Millisecond}}, 2, 810 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := pace{budget: tt.budget}
			for i, r := range tt.rounds {
				ready, late := p.round(r.pages, r.took)
				if ready != (i+1 == tt.after) || !ready && late != 0 {
					t.Fatalf("after round %d: ready %v, late %s", i+1, ready, late)
				}
				if ready && late.Round(time.Millisecond) != tt.late {
					t.Errorf("late %s, want %s", late, tt.late)
				}
			}
		})
	}
}

// What a target writes back tells how long the rest would take, from the second round on, and when
// the source should be frozen.
func TestSigns(t *testing.T) {
	var b bytes.Buffer
	round := signs(&b)
	round(checkpoint.Round{Number: 0})
	if b.Len() != 0 {
		t.Errorf("after the first round it writes %q", b.Bytes())
	}
	time.Sleep(time.Millisecond)
	round(checkpoint.Round{Number: 1, Ready: true})
	round(checkpoint.Round{Number: 2, Final: true})
	if b.Len() != 10 || b.Bytes()[0] != migration.StreamExpected || binary.BigEndian.Uint64(b.Bytes()[1:]) == 0 {
		t.Errorf("it writes %q", b.Bytes())
	}
	if err := migrationtest.WaitReady(&b); err != nil || b.Len() != 0 {
		t.Errorf("%v, %q is left", err, b.Bytes())
	}
}
