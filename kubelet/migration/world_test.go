package migration_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"podmig.dev/podmig/kubelet/migration/migrationtest"
)

// trace keeps the story of a world for the case that it ends badly.
type trace struct{ lines []string }

func (t *trace) log(s string)   { t.lines = append(t.lines, s) }
func (t *trace) String() string { return strings.Join(t.lines, "\n") }

// The defaults take seconds. "-worlds 1000000 -thorough" is for a night.
var (
	worlds   = flag.Int("worlds", 5000, "random worlds")
	thorough = flag.Bool("thorough", false, "every pair of faults, not every 32nd first fault")
	firstly  = flag.Uint64("seed", 0, "seed of the first random world; 0 draws one")
)

// TestHappyPath: with nothing going wrong the pod moves.
func TestHappyPath(t *testing.T) {
	var tr trace
	w := migrationtest.New(tr.log)
	if err := w.Finish(); err != nil {
		t.Fatalf("%v\n%s", err, &tr)
	}
	if w.Recorded != "True" {
		t.Fatalf("%s\n%s", w.Summary(), &tr)
	}
}

// TestRandom: whatever happens in whatever order, never two copies, and in the end
// one. A failure prints its seed.
func TestRandom(t *testing.T) {
	runs, seed := *worlds, *firstly
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("first seed %d", seed)
	outcomes := map[string]int{}
	for i := range runs {
		s := seed + uint64(i)
		if err := random(s, nil, outcomes); err != nil {
			var tr trace
			_ = random(s, tr.log, outcomes)
			t.Fatalf("seed %d: %v\n%s", s, err, &tr)
		}
	}
	t.Logf("%v", outcomes)
	for _, want := range []string{"True", "False", "off"} {
		if outcomes[want] < runs/200 {
			t.Errorf("only %d of %d runs ended %q; the test does not reach what it claims", outcomes[want], runs, want)
		}
	}
}

func random(seed uint64, log func(string), outcomes map[string]int) error {
	r := rand.New(rand.NewPCG(seed, seed))
	w := migrationtest.New(log)
	// Half of the worlds get into the middle of a migration before it begins to go
	// wrong, and then badly.
	calm := 3 + r.IntN(60)
	if r.IntN(2) == 0 {
		calm = 2 + r.IntN(5)
		for range r.IntN(50) {
			w.Next()
		}
	}
	err := w.Random(10+r.IntN(60), calm, r.IntN)
	if strings.Contains(w.Summary(), " off,") {
		outcomes["off"]++
	} else {
		outcomes[w.Recorded]++
	}
	return err
}

// TestEveryFault: one thing goes wrong, at every step of a migration.
func TestEveryFault(t *testing.T) {
	n := explore(t, 1)
	t.Logf("%d worlds", n)
}

// TestEveryPairOfFaults: two things go wrong, each at every step. Without -thorough
// the first of them is one in 32, others each time.
func TestEveryPairOfFaults(t *testing.T) {
	n := explore(t, 2)
	t.Logf("%d worlds", n)
}

// explore runs one world for every way to put up to depth faults, timers or wishes
// into the course of things.
func explore(t *testing.T, depth int) int {
	t.Helper()
	n, firsts, turn := 0, 0, rand.IntN(32)
	var try func(path []string, at []int, which []int, depth int)
	try = func(path []string, at, which []int, depth int) {
		for step := 0; ; step++ {
			if len(at) > 0 && step < at[len(at)-1] {
				step = at[len(at)-1]
			}
			for choice := 0; ; choice++ {
				name, ok, err := replay(append(at[:len(at):len(at)], step), append(which[:len(which):len(which)], choice), nil)
				if !ok {
					if choice == 0 {
						return
					}
					break
				}
				n++
				here := append(path[:len(path):len(path)], fmt.Sprintf("step %d: %s", step, name))
				if err != nil {
					var tr trace
					_, _, _ = replay(append(at[:len(at):len(at)], step), append(which[:len(which):len(which)], choice), tr.log)
					t.Fatalf("%s: %v\n%s", strings.Join(here, ", "), err, &tr)
				}
				if depth > 1 {
					if firsts++; !*thorough && firsts%32 != turn {
						continue
					}
					try(here, append(at[:len(at):len(at)], step), append(which[:len(which):len(which)], choice), depth-1)
				}
			}
		}
	}
	try(nil, nil, nil, depth)
	return n
}

// replay runs a world in which the which[i]th thing that can go wrong does so before
// step at[i]; ok is false when there is no such thing.
func replay(at, which []int, log func(string)) (name string, ok bool, err error) {
	w, name := prepare(at, which, log)
	if w == nil {
		return "", false, nil
	}
	return name, true, w.Finish()
}

// world is the world of a replay before it is finished.
func world(at, which []int, log func(string)) *migrationtest.World {
	w, _ := prepare(at, which, log)
	return w
}

func prepare(at, which []int, log func(string)) (w *migrationtest.World, name string) {
	w = migrationtest.New(log)
	step := 0
	for i := range at {
		for ; step < at[i]; step++ {
			if !w.Next() {
				return nil, ""
			}
		}
		a, found := w.Nth(which[i])
		if !found {
			return nil, ""
		}
		name = a.Name
		w.Do(a)
	}
	return w, name
}

// TestLossesAfterTheCommit: once the pod was given away, lost messages and restarted
// kubelets cost time, but not the migration.
func TestLossesAfterTheCommit(t *testing.T) {
	n := 0
	for step := 0; ; step++ {
		w := migrationtest.New(nil)
		for range step {
			w.Next()
		}
		if w.State("source") == "none" && w.State("target") == "none" {
			break
		}
		if w.State("source") != "GivenAway" && w.State("source") != "Releasing" {
			continue
		}
		for choice := 0; ; choice++ {
			name, ok, err := replay([]int{step}, []int{choice}, nil)
			if !ok {
				break
			}
			harmless := strings.HasSuffix(name, " is lost") || strings.Contains(name, "kubelet dies") ||
				strings.Contains(name, "it still arrives") || strings.HasSuffix(name, "a second time") ||
				strings.HasSuffix(name, " passes") || strings.HasSuffix(name, "the stream breaks") ||
				strings.HasSuffix(name, "source's runtime dies") || strings.Contains(name, "journal:") ||
				strings.Contains(name, "API:")
			if !harmless || name == "target's deadline passes" {
				continue
			}
			n++
			var tr trace
			w := world([]int{step}, []int{choice}, tr.log)
			if err = w.Finish(); err != nil || w.Recorded != "True" {
				t.Errorf("step %d, %s: %v, Cloned=%s\n%s", step, name, err, w.Recorded, &tr)
			}
		}
	}
	if n < 50 {
		t.Errorf("only %d worlds", n)
	}
}

func FuzzWorld(f *testing.F) {
	f.Add([]byte("everything goes wrong at once, and then again"))
	f.Fuzz(func(t *testing.T, choices []byte) {
		i := 0
		var tr trace
		w := migrationtest.New(tr.log)
		if err := w.Random(len(choices), 4, func(n int) int {
			if i >= len(choices) {
				return -1
			}
			i++
			return int(choices[i-1]) % n
		}); err != nil {
			t.Fatalf("%v\n%s", err, &tr)
		}
	})
}
