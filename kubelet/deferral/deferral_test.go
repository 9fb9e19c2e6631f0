package deferral

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

var asked = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// deleted is a pod whose deletion was asked for at the time asked.
func deleted(grace int64, change func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{
		Finalizers:                 []string{"example.com/other", v1alpha1.FinalizerMigrate},
		DeletionGracePeriodSeconds: &grace,
		DeletionTimestamp:          &metav1.Time{Time: asked.Add(time.Duration(grace) * time.Second)},
	}}
	change(p)
	return p
}

func TestWaits(t *testing.T) {
	deadline := func(text string) func(*v1.Pod) {
		return func(p *v1.Pod) { p.Annotations = map[string]string{v1alpha1.AnnotationDeadline: text} }
	}
	for _, tt := range []struct {
		name   string
		grace  int64
		change func(*v1.Pod)
		// until is how long it waits; 0 for not at all.
		until time.Duration
	}{
		{"plain", 30, func(*v1.Pod) {}, DefaultDeadline},
		{"the grace period does not count", 3600, func(*v1.Pod) {}, DefaultDeadline},
		{"settable", 30, deadline("45"), 45 * time.Second},
		{"shorter than the grace period", 30, deadline("5"), 5 * time.Second},
		{"none", 30, deadline("0"), 0},
		{"a day at most", 30, deadline("1000000"), MaxDeadline},
		{"no number", 30, deadline("10m"), DefaultDeadline},
		{"negative", 30, deadline("-1"), DefaultDeadline},
		{"forced", 0, func(*v1.Pod) {}, 0},
		{"not deleted", 30, func(p *v1.Pod) { p.DeletionTimestamp, p.DeletionGracePeriodSeconds = nil, nil }, 0},
		{"another finalizer", 30, func(p *v1.Pod) { p.Finalizers = []string{"example.com/other"} }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := deleted(tt.grace, tt.change)
			for _, at := range []time.Duration{0, tt.until - time.Nanosecond, tt.until, 48 * time.Hour} {
				if at < 0 {
					continue
				}
				if got, want := Waits(p, asked.Add(at)), at < tt.until; got != want {
					t.Errorf("after %s: waits %v, want %v", at, got, want)
				}
			}
		})
	}
}

func TestLimitSaysWhatIsNoNumber(t *testing.T) {
	for text, want := range map[string]bool{"60": true, "0": true, "": false, "1m": false, "1e3": false, "99999999999": false} {
		p := deleted(30, func(p *v1.Pod) { p.Annotations = map[string]string{v1alpha1.AnnotationDeadline: text} })
		if _, ok := Limit(p); ok != want {
			t.Errorf("%q: %v, want %v", text, ok, want)
		}
	}
}

// Each pod is "name[<source] [flags]".
func TestReplicas(t *testing.T) {
	for _, tt := range []struct{ name, pods, want string }{
		{"ordinary pods", "a, b, c", "a b c"},
		{"one has failed", "a, b failed", "a"},
		{"one is being deleted", "a, b deleted", "a"},
		{"one waits", "a, b waits", "a b"},
		{"the clone prepares", "a, c<a", "a"},
		{"the source waits, the clone prepares", "a waits, c<a", "a"},
		{"taken over, source not yet", "a, c<a cloned", "c"},
		{"taken over, source waits", "a waits, c<a cloned", "c"},
		{"source first", "a failed, c<a", "c"},
		{"source gone", "c<a", "c"},
		{"both say so", "a failed, c<a cloned", "c"},
		{"the clone has failed", "a, c<a failed", "a"},
		{"the source is deleted for good", "a deleted, c<a", ""},
		{"given away before it was deleted for good", "a deleted, c<a cloned", "c"},
		{"both have failed", "a failed, c<a failed", ""},
		{"on again", "a failed, c<a cloned waits, d<c", "c"},
		{"on again, arrived", "c<a cloned waits, d<c cloned", "d"},
		{"two clones", "a, c<a, d<a", "a"},
		{"one of two clones took over", "a, c<a cloned, d<a", "c"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sources := map[string]string{}
			var pods []*v1.Pod
			for text := range strings.SplitSeq(tt.pods, ", ") {
				f := strings.Fields(text)
				name, source, _ := strings.Cut(f[0], "<")
				p := &v1.Pod{}
				for _, flag := range f[1:] {
					switch flag {
					case "failed":
						p.Status.Phase = v1.PodFailed
					case "deleted", "waits":
						q := deleted(30, func(*v1.Pod) {})
						p.ObjectMeta = q.ObjectMeta
						if flag == "deleted" {
							p.Finalizers = nil
						}
					case "cloned":
						p.Status.Conditions = []v1.PodCondition{{Type: v1alpha1.ConditionCloned, Status: v1.ConditionTrue}}
					default:
						t.Fatal(flag)
					}
				}
				p.Name = name
				sources[name] = source
				pods = append(pods, p)
			}
			// The order in which an informer has them says nothing.
			for range 2 {
				slices.Reverse(pods)
				counted, others := Replicas(pods, func(p *v1.Pod) string { return sources[p.Name] }, asked)
				var names []string
				for _, p := range counted {
					names = append(names, p.Name)
				}
				slices.Sort(names)
				if got := strings.Join(names, " "); got != tt.want || len(counted)+len(others) != len(pods) {
					t.Errorf("counted %q and %d others, want %q of %d", got, len(others), tt.want, len(pods))
				}
			}
		})
	}
}

// Whatever order the two kubelets' last words arrive in, one of the pair counts.
func TestReplicasCountsOneOfAPair(t *testing.T) {
	clonePod := func(p *v1.Pod) string {
		if p.Name == "clone" {
			return "source"
		}
		return ""
	}
	for i := range 1 << 3 {
		source, clone := &v1.Pod{}, &v1.Pod{}
		if i&1 != 0 {
			source = deleted(30, func(*v1.Pod) {})
		}
		if i&2 != 0 {
			source.Status.Phase = v1.PodFailed
		}
		if i&4 != 0 {
			clone.Status.Conditions = []v1.PodCondition{{Type: v1alpha1.ConditionCloned, Status: v1.ConditionTrue}}
		}
		source.Name, clone.Name = "source", "clone"
		if counted, _ := Replicas([]*v1.Pod{source, clone}, clonePod, asked); len(counted) != 1 {
			t.Errorf("case %s: %d count", fmt.Sprintf("%03b", i), len(counted))
		}
	}
}
