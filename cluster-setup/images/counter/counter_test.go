package main

import (
	"testing"
	"time"
)

func TestSeries(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		numbers []uint64
		want    series
	}{
		{"in order", []uint64{1, 2, 3}, series{Last: 3, Received: 3}},
		{"begins in the middle", []uint64{7, 8}, series{Last: 8, Received: 2}},
		{"resent after a lost answer", []uint64{1, 2, 2, 3}, series{Last: 3, Received: 3, Resent: 1}},
		{"gap", []uint64{1, 3}, series{Last: 3, Received: 2, Faults: 1, Fault: "3 after 1"}},
		{"from the past", []uint64{4, 5, 3, 4}, series{Last: 4, Received: 4, Faults: 1, Fault: "3 after 5"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var s series
			for _, number := range test.numbers {
				s.receive(number)
			}
			if s != test.want {
				t.Errorf("got %+v, want %+v", s, test.want)
			}
		})
	}
}

func TestObserveAllowsLeapsOnly(t *testing.T) {
	t.Parallel()
	var s series
	for _, number := range []uint64{1, 1, 5, 9, 8} {
		s.observe(number)
	}
	if s.Faults != 1 || s.Fault != "8 after 9" {
		t.Errorf("got %+v", s)
	}
}

func TestSharedFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	counters := map[string]*counter{}
	for _, name := range []string{"a", "b"} {
		c, err := newCounter(settings{name: name, dir: dir, tick: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		counters[name] = c
	}
	for number := uint64(1); number <= 3; number++ {
		for _, c := range counters {
			if err := c.share(number); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range counters {
		for other, s := range c.status().Files {
			if s.Faults != 0 {
				t.Errorf("%s found a fault of %s: %+v", name, other, s)
			}
		}
	}
	// A copy that was set back is noticed.
	if err := counters["a"].share(1); err != nil {
		t.Fatal(err)
	}
	if err := counters["b"].share(4); err != nil {
		t.Fatal(err)
	}
	if s := counters["b"].status().Files["a"]; s.Faults != 1 {
		t.Errorf("got %+v", s)
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	given := map[string]string{"COUNTER_TICK": "1s", "COUNTER_PEERS": "http://a,http://b", "COUNTER_NAME": "x"}
	s, err := read(func(name string) string { return given[name] })
	if err != nil || s.tick != time.Second || len(s.peers) != 2 || s.name != "x" || s.listen != ":8080" {
		t.Errorf("got %+v, %v", s, err)
	}
	given["COUNTER_TICK"] = "0"
	if _, err := read(func(name string) string { return given[name] }); err == nil {
		t.Error("a counter without pauses was accepted")
	}
}
