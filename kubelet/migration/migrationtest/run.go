package migrationtest

import "fmt"

// maxQuiet bounds Finish. A world that needs more turns in circles.
const maxQuiet = 3000

// Finish lets everything that goes wrong stop and the world run on until nothing
// happens any more. Timers pass only when nothing else can happen.
func (w *World) Finish() error {
	for range maxQuiet {
		if err := w.Check(); err != nil {
			return err
		}
		a, ok := w.next()
		if !ok {
			return w.CheckEnd()
		}
		w.Do(a)
	}
	return fmt.Errorf("turns in circles: %s", w.Summary())
}

// next is what happens next when nothing goes wrong: what can happen at once, or the
// timer that is due first.
func (w *World) next() (Action, bool) {
	var first Action
	found := false
	for _, a := range w.Actions() {
		if a.Kind == Normal {
			return a, true
		}
		if a.Kind == Time && (!found || a.due < first.due) {
			first, found = a, true
		}
	}
	return first, found
}

// Random carries out up to steps actions that choose picks, then Finish. choose gets
// a number and returns a smaller one, or a negative one to stop. One step in calm is
// something that goes wrong, passes or is wanted by somebody.
func (w *World) Random(steps, calm int, choose func(n int) int) error {
	for range steps {
		if err := w.Check(); err != nil {
			return err
		}
		all := w.Actions()
		if len(all) == 0 {
			break
		}
		kinds := map[bool][]Action{}
		for _, a := range all {
			kinds[a.Kind == Normal] = append(kinds[a.Kind == Normal], a)
		}
		c := choose(calm)
		if c < 0 {
			break
		}
		from := kinds[c > 0 || len(kinds[false]) == 0]
		if len(from) == 0 {
			from = kinds[false]
		}
		i := choose(len(from))
		if i < 0 {
			break
		}
		w.Do(from[i])
	}
	return w.Finish()
}

// Next carries out what happens when nothing goes wrong; false when nothing does.
func (w *World) Next() bool {
	a, ok := w.next()
	if ok {
		w.Do(a)
	}
	return ok
}

// Nth is the nth thing that can happen beside the normal ones.
func (w *World) Nth(n int) (Action, bool) {
	for _, a := range w.Actions() {
		if a.Kind != Normal {
			if n == 0 {
				return a, true
			}
			n--
		}
	}
	return Action{}, false
}
