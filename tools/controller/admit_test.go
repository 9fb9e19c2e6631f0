package controller

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

func TestAdmissible(t *testing.T) {
	// Each is "name pod source target", with flags behind it.
	one := func(age int, text string) v1alpha1.PodMigration {
		f := strings.Fields(text)
		m := v1alpha1.PodMigration{
			ObjectMeta: metav1.ObjectMeta{Name: f[0], UID: types.UID(f[0]), CreationTimestamp: metav1.NewTime(time.Unix(int64(age), 0))},
			Spec:       v1alpha1.PodMigrationSpec{PodName: f[1], TargetNode: strings.Trim(f[3], "-")},
		}
		m.Status.SourceNode = strings.Trim(f[2], "-")
		for _, flag := range f[4:] {
			switch flag {
			case "runs":
				m.Status.ClonePodName, m.Status.Phase = "c", v1alpha1.PhaseFreezing
			case "over":
				m.Status.ClonePodName, m.Status.Phase = "c", v1alpha1.PhaseSucceeded
			case "deleted":
				m.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
			case "urgent":
				m.Spec.Priority = 10
			default:
				t.Fatalf("flag %s", flag)
			}
		}
		return m
	}
	for _, tt := range []struct {
		name   string
		limits Limits
		all    []string
		want   string
	}{
		{"no limits", Limits{}, []string{"a p - -", "b q - -"}, "a b"},
		{"oldest first", Limits{Cluster: 1}, []string{"a p - -", "b q - -"}, "a"},
		{"urgent first", Limits{Cluster: 1}, []string{"a p - -", "b q - - urgent"}, "b"},
		{"one runs", Limits{Cluster: 2}, []string{"a p - - runs", "b q - -", "c r - -"}, "b"},
		{"those that are over do not count", Limits{Cluster: 1}, []string{"a p - - over", "b q - -"}, "b"},
		{"deleted ones do not wait", Limits{Cluster: 1}, []string{"a p - - deleted", "b q - -"}, "b"},
		{"same pod", Limits{}, []string{"a p - - runs", "b p - -", "c p - -"}, ""},
		{"same pod, both wait", Limits{}, []string{"a p - -", "b p - -"}, "a"},
		{"a full node holds back nobody else", Limits{Node: 1}, []string{"a p n1 n2 runs", "b q n2 n3", "c r n3 n4"}, "c"},
		{"an unknown node is no node", Limits{Node: 1}, []string{"a p n1 - runs", "b q n2 -"}, "b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var all []v1alpha1.PodMigration
			for i, text := range tt.all {
				all = append(all, one(i, text))
			}
			slices.Reverse(all)
			var got []string
			for _, uid := range slices.Sorted(maps.Keys(admissible(all, tt.limits))) {
				got = append(got, string(uid))
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("admitted %q, want %q", s, tt.want)
			}
		})
	}
}
