// Package bench measures what a migration costs a pod, beside what the same pod would
// cost without one.
//
// Every repetition of every size runs three arms, one after the other, so that a
// machine that is slow for a while is slow for all of them:
//
//   - move: the pod moves to the other node (spec.clonePod);
//   - recreate: the pod is deleted and created again on the other node, the way a
//     workload without migration gets there;
//   - bare: the same program outside Kubernetes, criu dump, copy, criu restore, each
//     as fast as it goes and nothing around them.
//
// The gap is what a client outside both nodes sees that asks every millisecond: the
// longest time between two answers. The pod's address changes with a move, so the
// client asks every address the pod ever had; what a client needs to find the new
// address is not part of the gap. In the arm recreate the pod answers before its memory is filled
// again, which is in that arm's favour.
//
// The package prints what it measured and judges nothing but that the memory of the
// moved pod is what it was. The tests cover the arithmetic and the report.
package bench
