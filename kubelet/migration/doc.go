// Package migration is the engine: it decides who owns a pod that moves between
// two nodes, and what each kubelet does next.
//
// # Ownership
//
// The right to run the processes is a token. Until the commit the source holds
// it and may abort whenever it likes; the source gives it away by writing
// "GivenAway" to its journal, and only then answers the commit. The target starts
// no process before it has read that answer. Afterwards the source keeps the
// frozen processes until the target says "done" (they are stopped) or "failed"
// (the token comes back and they run on). The target says "failed" only when no
// restored process exists and none will.
//
// A crash loses nothing that matters: whatever the other side may rely on has
// been written to the journal before the other side could learn of it.
//
// # Use
//
// There is one machine per migration and side: Source and Target. Step takes one
// event and returns effects; nothing else changes a machine. Effects are data and
// have to be carried out in the order in which they are returned. Time is an
// event (TimerFired), an abort is an event, the result of an effect is an event.
// A machine is not safe for concurrent use.
//
// The package does no I/O, has no clock, starts no goroutine and logs nothing.
//
// # Duties of the caller
//
//  1. One source machine per source pod at a time, whichever clone asks; a machine
//     counts until it is Terminal. A second session is refused before it gets a
//     machine. A request reaches a machine only when the caller of the request was
//     authorised for exactly this session.
//  2. WriteJournal and DeleteJournal are carried out in order and each is answered
//     with JournalWritten, JournalDeleted or JournalFailed that carries its Seq.
//     Durable means what it says: JournalWritten may follow only when a crash or a
//     power loss can no longer bring the older record back.
//  3. Calls to the runtime for one machine are ordered: before FinishCheckpoint or
//     StopRestored is sent, calls still running have returned, except those that it
//     ends itself: the freeze, the verification, the restore.
//     StopRestored is answered with RestoredStopped only when the runtime has
//     confirmed that no process of the pod exists in any of its containers.
//  4. Containers of the clone are never started by anything but RestoreContainers.
//     While GuardPod holds, nothing restarts, evicts, signals, terminates or enters
//     the source's containers.
//  5. After a kubelet restart every record of the journal becomes a machine
//     (LoadSource, LoadTarget) that gets Restarted before the kubelet synchronises
//     pods or answers a peer. A pod that is being deleted, and a clone whose final
//     condition is already False, gets Cancelled right after.
//  6. A verdict VerdictOK is reported only for an answer that was read in full. What
//     could not be read is VerdictNoAnswer, never a guess.
//  7. AskTarget is answered with the truth: OutcomeGone only when the target's kubelet
//     itself said that it knows no such session and has no container of the clone.
//     PeerFenced only when somebody with authority said that the peer's machine is
//     off (the out-of-service taint), never because it does not answer.
package migration
