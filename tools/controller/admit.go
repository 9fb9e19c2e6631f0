package controller

import (
	"cmp"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// Limits are how many migrations run at a time; 0 is no limit.
type Limits struct {
	// Cluster bounds all of them, Node those that leave or reach one node.
	Cluster, Node int
}

// begun tells whether a migration has, or is about to have, a clone.
func begun(m *v1alpha1.PodMigration) bool {
	return m.Status.ClonePodName != "" && !m.Status.Phase.Over()
}

// admissible returns which of the waiting migrations may begin, by priority and age. One
// that a node's limit or another migration of the same pod holds back holds back nobody
// else.
func admissible(all []v1alpha1.PodMigration, limits Limits) map[types.UID]bool {
	var waiting []*v1alpha1.PodMigration
	running := 0
	nodes := map[string]int{}
	pods := map[types.NamespacedName]bool{}
	pod := func(m *v1alpha1.PodMigration) types.NamespacedName {
		return types.NamespacedName{Namespace: m.Namespace, Name: m.Spec.PodName}
	}
	take := func(m *v1alpha1.PodMigration) {
		running++
		pods[pod(m)] = true
		for _, node := range ends(m) {
			nodes[node]++
		}
	}
	for i := range all {
		switch m := &all[i]; {
		case begun(m):
			take(m)
		case !m.Status.Phase.Over() && m.DeletionTimestamp.IsZero():
			waiting = append(waiting, m)
		}
	}
	slices.SortStableFunc(waiting, func(a, b *v1alpha1.PodMigration) int {
		return cmp.Or(
			cmp.Compare(b.Spec.Priority, a.Spec.Priority),
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Namespace, b.Namespace),
			cmp.Compare(a.Name, b.Name),
		)
	})
	out := map[types.UID]bool{}
	for _, m := range waiting {
		if limits.Cluster > 0 && running >= limits.Cluster {
			break
		}
		full := slices.ContainsFunc(ends(m), func(node string) bool { return limits.Node > 0 && nodes[node] >= limits.Node })
		if full || pods[pod(m)] {
			continue
		}
		take(m)
		out[m.UID] = true
	}
	return out
}

// ends are the nodes of a migration that are known.
func ends(m *v1alpha1.PodMigration) []string {
	target := cmp.Or(m.Status.TargetNode, m.Spec.TargetNode)
	return slices.DeleteFunc([]string{m.Status.SourceNode, target}, func(node string) bool { return node == "" })
}
