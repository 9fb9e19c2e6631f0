//go:build e2e

package e2e

import (
	"fmt"
	"testing"
	"time"
)

const writerPod = `
apiVersion: v1
kind: Pod
metadata: {name: writer-0}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: data, emptyDir: {}}
  containers:
  - name: writer
    image: podmig.dev/writer:v1
    imagePullPolicy: Never
    volumeMounts: [{name: data, mountPath: /volume}]
    readinessProbe: {httpGet: {path: /verify, port: 8080}, periodSeconds: 1, timeoutSeconds: 5}
`

type writerState struct {
	PID    int
	Writes map[string]uint64
	Faults []string
}

// grown tells whether every place was written to at least n times since before.
func (s writerState) grown(before writerState, n uint64) error {
	for place, writes := range s.Writes {
		if writes < before.Writes[place]+n {
			return fmt.Errorf("%s was written to %d times, before %d times", place, writes, before.Writes[place])
		}
	}
	return nil
}

// A pod writes to its writable layer, a volume, /dev/shm, a mapped file, a deleted
// file and its memory all the time. What the processes find on the target is what they
// had written when they were frozen, not less and not more: the memory, which was
// frozen with them, knows every byte.
func TestPodMovesWhileItWrites(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "writer-0", writerPod)
	var before writerState
	nodes := []string{node1, node2}
	for i := 0; i <= 6; i++ {
		if i > 0 {
			p = move(ctx, t, k, p.Name, fmt.Sprintf("writer-%d", i), nodes[i%2])
		}
		var now writerState
		for _, n := range []uint64{1, 100} {
			until(ctx, t, "all places are written to", func() error {
				now = getJSON[writerState](ctx, t, p, 8080, "/verify")
				if len(now.Faults) > 0 {
					t.Fatalf("move %d: %q", i, now.Faults)
				}
				return now.grown(before, n)
			})
		}
		if i > 0 && now.PID != before.PID {
			t.Fatalf("move %d: process %d, before it %d", i, now.PID, before.PID)
		}
		before = now
	}
	if len(before.Writes) < 7 {
		t.Errorf("there are only the places %v", before.Writes)
	}
}
