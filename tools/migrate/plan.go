package migrate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

// standing is what is to become of a pod of a node that is emptied.
type standing int

const (
	// skipped: it has ended, or it has moved without us.
	skipped standing = iota
	// belonging: it is part of its node; an empty node may have it.
	belonging
	// staying: it cannot be moved.
	staying
	// rejected: the API server took no migration of it.
	rejected
	// waiting: something else has to happen first.
	waiting
	// ready: its migration is to be ordered now.
	ready
	// moving: the migration that was ordered for it is not over.
	moving
	// ended: that migration is over.
	ended
)

// row is one pod of the node and what becomes of it.
type row struct {
	pod      *corev1.Pod
	standing standing
	// why is a sentence for all but moving and ended, which have a migration instead.
	why       string
	migration *v1alpha1.PodMigration
}

// observed is what is known of a node that is emptied. It decides by that alone: rows says
// what is to be done now.
type observed struct {
	pods       map[types.UID]*corev1.Pod
	migrations map[types.UID]*v1alpha1.PodMigration
	budgets    map[types.UID]*policyv1.PodDisruptionBudget
	// gone are the pods that do not exist any more.
	gone map[types.UID]bool
	// ordered has the migration of a pod that was ordered by us, rejected why there is none.
	ordered  map[types.UID]types.UID
	rejected map[types.UID]string
	// elsewhere has the labels of the pods of migrations whose pods are not among ours; nil if
	// there is no such pod.
	elsewhere map[types.UID]labels.Set
	// most is what a budget allowed when it was first seen, and at least one: while a clone is ready
	// and its source has not said yet that it has ended, both count as healthy, and the budget
	// allows one more than there is.
	most map[types.UID]int32
	// settled tells of clones whether they are ready, have ended or are gone.
	settled map[types.NamespacedName]bool
}

func newObserved() *observed {
	return &observed{
		pods: map[types.UID]*corev1.Pod{}, migrations: map[types.UID]*v1alpha1.PodMigration{}, budgets: map[types.UID]*policyv1.PodDisruptionBudget{},
		gone: map[types.UID]bool{}, ordered: map[types.UID]types.UID{}, rejected: map[types.UID]string{}, elsewhere: map[types.UID]labels.Set{},
		settled: map[types.NamespacedName]bool{}, most: map[types.UID]int32{},
	}
}

// The four below take in that an object has changed or, if so, is gone.

func (s *observed) seePod(p *corev1.Pod, gone bool) {
	s.pods[p.UID] = p
	if gone {
		s.gone[p.UID] = true
	}
}

func (s *observed) seeMigration(m *v1alpha1.PodMigration, gone bool) {
	if gone && !m.Status.Phase.Over() {
		m = m.DeepCopy()
		m.Status.Phase, m.Status.Reason, m.Status.Message = v1alpha1.PhaseCancelled, v1alpha1.ReasonCancelled, deletedMessage
	}
	s.migrations[m.UID] = m
}

func (s *observed) seeBudget(b *policyv1.PodDisruptionBudget, gone bool) {
	s.budgets[b.UID] = b
	if _, known := s.most[b.UID]; !known {
		s.most[b.UID] = max(1, b.Status.DisruptionsAllowed)
	}
	if gone {
		delete(s.budgets, b.UID)
	}
}

func (s *observed) seeClone(p *corev1.Pod, gone bool) {
	ready := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue })
	s.settled[types.NamespacedName{Namespace: p.Namespace, Name: p.Name}] = gone || ready || deferral.Ended(p)
}

// order notes that a migration was made for a pod.
func (s *observed) order(p *corev1.Pod, m *v1alpha1.PodMigration) {
	s.ordered[p.UID] = m.UID
	if s.migrations[m.UID] == nil {
		s.migrations[m.UID] = m
	}
}

// podOf is the pod of the node that a migration moves, nil if it is not there.
func (s *observed) podOf(m *v1alpha1.PodMigration) *corev1.Pod {
	for _, p := range s.pods {
		if moves(m, p) {
			return p
		}
	}
	return nil
}

func moves(m *v1alpha1.PodMigration, p *corev1.Pod) bool {
	return m.Namespace == p.Namespace && m.Spec.PodName == p.Name && (m.Status.SourcePodUID == "" || m.Status.SourcePodUID == p.UID)
}

// rows says of all pods, in order of their names, what becomes of them. Pods that are ready
// count as moving for the others.
func (s *observed) rows() []row {
	pods := slices.SortedFunc(maps.Values(s.pods), func(a, b *corev1.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	used := s.used()
	var out []row
	for _, p := range pods {
		r := row{pod: p}
		r.standing, r.why = s.stand(p)
		if id, ok := s.ordered[p.UID]; ok {
			r.migration = s.migrations[id]
		}
		if r.standing == ready {
			if r.why = s.held(p, used); r.why != "" {
				r.standing = waiting
			}
		}
		if r.standing == ready {
			for _, b := range s.budgetsOf(p.Namespace, p.Labels) {
				used[b.UID]++
			}
		}
		out = append(out, r)
	}
	return out
}

// stand judges a pod without its disruption budgets.
func (s *observed) stand(p *corev1.Pod) (standing, string) {
	if id, ok := s.ordered[p.UID]; ok {
		if s.migrations[id].Status.Phase.Over() {
			return ended, ""
		}
		return moving, ""
	}
	if s.gone[p.UID] {
		return skipped, ""
	}
	if what, why := fit(p); what != ready {
		return what, why
	}
	if why := s.rejected[p.UID]; why != "" {
		return rejected, why
	}
	for _, m := range s.migrations {
		switch {
		case !moves(m, p):
		case !m.Status.Phase.Over():
			return waiting, fmt.Sprintf("Migration %s moves it already.", m.Name)
		case m.Status.Phase == v1alpha1.PhaseSucceeded && m.Status.SourcePodUID == p.UID:
			// Its own status is about to say so, too.
			return skipped, ""
		}
	}
	return ready, ""
}

// fit judges a pod by itself: ready is one that can be moved. The controller has the last
// word; what it would refuse for certain is not ordered.
func fit(p *corev1.Pod) (standing, string) {
	owner := metav1.GetControllerOf(p)
	_, mirror := p.Annotations[corev1.MirrorPodAnnotationKey]
	clone := p.Annotations[v1alpha1.AnnotationSource] != "" || slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == v1alpha1.ConditionCloned
	})
	switch {
	case deferral.Ended(p):
		return skipped, ""
	case mirror:
		return belonging, "It is a static pod of the node's kubelet."
	case owner != nil && owner.Kind == "DaemonSet":
		return belonging, fmt.Sprintf("It belongs to DaemonSet %s and so to the node.", owner.Name)
	case owner != nil && !movable(owner):
		return staying, fmt.Sprintf("It belongs to %s %s, which does not let its pods move; delete it, or scale down what it belongs to.", owner.Kind, owner.Name)
	case p.DeletionTimestamp != nil:
		return waiting, "It is being deleted."
	case clone && !deferral.Cloned(p):
		return waiting, "It is the clone of a pod that moves to this node."
	case p.Status.Phase != corev1.PodRunning:
		return staying, fmt.Sprintf("It is %s; only a running pod can be moved.", cmp.Or(p.Status.Phase, corev1.PodPending))
	}
	return ready, ""
}

// movable tells whether a controller bears that its pods move.
func movable(owner *metav1.OwnerReference) bool {
	group, _, _ := strings.Cut(owner.APIVersion, "/")
	switch owner.Kind {
	case "ReplicaSet":
		return group == "apps"
	case "ReplicationController":
		return owner.APIVersion == "v1"
	case "MigratingPod":
		return group == v1alpha1.GroupVersion.Group
	}
	return false
}

// budgetsOf are the disruption budgets that select a pod, in order of their names.
func (s *observed) budgetsOf(namespace string, l labels.Set) []*policyv1.PodDisruptionBudget {
	var out []*policyv1.PodDisruptionBudget
	for _, b := range s.budgets {
		// One that cannot be read selects no pod for the API server either.
		if sel, err := metav1.LabelSelectorAsSelector(b.Spec.Selector); err == nil && b.Namespace == namespace && sel.Matches(l) {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b *policyv1.PodDisruptionBudget) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// underWay tells whether a migration uses up a budget: until it is over and, if we ordered
// it, until its clone is ready. The budget's own count may come later than the clone.
func (s *observed) underWay(m *v1alpha1.PodMigration) bool {
	if m.Status.Phase != v1alpha1.PhaseSucceeded || m.Status.ClonePodName == "" {
		return !m.Status.Phase.Over()
	}
	ours := slices.Contains(slices.Collect(maps.Values(s.ordered)), m.UID)
	return ours && !s.settled[types.NamespacedName{Namespace: m.Namespace, Name: m.Status.ClonePodName}]
}

// used counts the pods under way of each budget, whoever ordered that and wherever they are.
func (s *observed) used() map[types.UID]int32 {
	used := map[types.UID]int32{}
	for _, m := range s.migrations {
		if !s.underWay(m) {
			continue
		}
		l, ok := s.elsewhere[m.UID]
		if p := s.podOf(m); p != nil {
			l, ok = p.Labels, true
			if l == nil {
				l = labels.Set{}
			}
		}
		if !ok || l == nil {
			continue
		}
		for _, b := range s.budgetsOf(m.Namespace, l) {
			used[b.UID]++
		}
	}
	return used
}

// unknown are the migrations under way whose pods' labels are needed and not known.
func (s *observed) unknown() []*v1alpha1.PodMigration {
	var out []*v1alpha1.PodMigration
	for _, m := range s.migrations {
		_, known := s.elsewhere[m.UID]
		budget := false
		for _, b := range s.budgets {
			budget = budget || b.Namespace == m.Namespace
		}
		if budget && !known && !m.Status.Phase.Over() && s.podOf(m) == nil {
			out = append(out, m)
		}
	}
	return out
}

// held says which budget has no place for one more pod under way.
func (s *observed) held(p *corev1.Pod, used map[types.UID]int32) string {
	for _, b := range s.budgetsOf(p.Namespace, p.Labels) {
		allowed := b.Status.DisruptionsAllowed
		if b.Status.ObservedGeneration < b.Generation {
			// The number is of an older budget.
			allowed = 0
		}
		if most, ok := s.most[b.UID]; ok {
			allowed = min(allowed, most)
		}
		if used[b.UID] >= allowed {
			return fmt.Sprintf("PodDisruptionBudget %s holds it back: it allows %d, and %d of its pods are under way.", b.Name, allowed, used[b.UID])
		}
	}
	return ""
}

// count is how many rows there are of each standing.
func count(rows []row) map[standing]int {
	n := map[standing]int{}
	for _, r := range rows {
		n[r.standing]++
	}
	return n
}

// NodeError is a node that is not empty, or was not emptied without loss.
type NodeError struct {
	Node string
	text string
	code int
}

func (e *NodeError) Error() string {
	return fmt.Sprintf("node %s: %s; the table says why", e.Node, e.text)
}

// Code is that of the worst pod; one that is left counts as refused.
func (e *NodeError) Code() int { return e.code }

// verdict sums rows up; nil if nothing is left that could be moved and nothing was lost.
func verdict(node string, rows []row) error {
	n := map[string]int{}
	code := 0
	for _, r := range rows {
		c := 0
		switch r.standing {
		case staying:
			n["cannot be moved"]++
			c = codeLeft
		case waiting:
			n["held back"]++
			c = codeLeft
		case rejected:
			n["not ordered"]++
			c = codeLeft
		case moving:
			n["ordered"]++
		case ended:
			m := r.migration
			n[outcome[m.Status.Phase]]++
			if m.Status.Phase != v1alpha1.PhaseSucceeded {
				c = (&EndedError{Phase: m.Status.Phase}).Code()
			}
		}
		code = worse(code, c)
	}
	if code == 0 {
		return nil
	}
	var parts []string
	for _, what := range []string{"ordered", "moved", "lost", "rolled back", "refused", "cancelled", "not ordered", "cannot be moved", "held back"} {
		if n[what] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n[what], what))
		}
	}
	return &NodeError{Node: node, text: strings.Join(parts, ", "), code: code}
}

var outcome = map[v1alpha1.Phase]string{
	v1alpha1.PhaseSucceeded: "moved", v1alpha1.PhaseFailed: "lost", v1alpha1.PhaseRolledBack: "rolled back",
	v1alpha1.PhaseRefused: "refused", v1alpha1.PhaseCancelled: "cancelled",
}

// codeLeft is the code of a pod that stays although nothing has happened to it.
const codeLeft = 3

// worse is the exit code that says more about what needs a look.
func worse(a, b int) int {
	order := []int{0, 1, 6, codeLeft, 4, 5}
	if slices.Index(order, a) > slices.Index(order, b) {
		return a
	}
	return b
}
