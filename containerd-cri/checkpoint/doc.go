// Package checkpoint is the format of a pod checkpoint: one stream of bytes that
// carries memory, files and logs of the containers from the source to the target,
// and the manifest that ends it.
//
// A stream is a header (magic, version, session), frames, and a manifest. Frames
// belong to parts and parts interleave, so containers are dumped in parallel.
// Memory comes as runs of pages with an address and a round: pages of a later
// round replace earlier ones, which lets rounds before the freeze and pages served
// after the restore use the same frames. Every part is hashed as it passes, pages by
// a sum per frame (hashFrame). The
// manifest holds the hashes, and no part is believed before they match.
//
// Writer and Reader hold one frame at a time, so their memory does not depend on
// the size of the checkpoint. The Reader treats its input as hostile: sizes, names
// and order are checked before anything is handed on. What the parts mean for a
// node (which file may be created, which image restored) is not decided here.
package checkpoint
