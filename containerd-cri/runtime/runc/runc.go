package runc

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// Runtime implements runtime.Runtime. The zero value is ready to use.
type Runtime struct {
	cgroups cgroups
	// kept counts what trackers remember.
	kept atomic.Int64
}

var _ runtime.Runtime = (*Runtime)(nil)

// New returns the runtime of this node.
func New() *Runtime { return &Runtime{} }

// What a dump and a restore of a pod need of CRIU beyond what runc sets, in the form
// of CRIU's configuration file.
//
// Established connections are closed on the target: its pod has another address.
// The network is not locked, because nothing has to be kept in it. Ghost files
// (deleted but open) are copied up to a size that is still far below memory sizes.
// During a restore the images give their memory back page by page: a restore does not
// need the memory of the processes twice, and takes no longer, because pages that were
// just given back are the fastest to get.
const (
	dumpOptions    = "tcp-close\nskip-in-flight\nnetwork-lock skip\nghost-limit 67108864\nfile-locks\n"
	RestoreOptions = dumpOptions + "auto-dedup\n"
)

// dumpError makes one error of what runc said and the decisive lines of CRIU's log.
func dumpError(c runtime.Container, err error, out []byte, log string) error {
	msg := strings.TrimSpace(string(out))
	if i := strings.LastIndexByte(msg, '\n'); i >= 0 {
		msg = msg[i+1:]
	}
	if lines := LogErrors(log); lines != "" {
		return fmt.Errorf("dump of container %s: %w: %s; criu: %s", c.Name, err, msg, lines)
	}
	return fmt.Errorf("dump of container %s: %w: %s", c.Name, err, msg)
}

// LogErrors returns the decisive lines of a CRIU log: the errors, at most five,
// separated by semicolons. The first ones name the cause, the last ones only that
// CRIU gave up.
func LogErrors(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	var out []string
	for line := range bytes.SplitSeq(b, []byte("\n")) {
		// Without CAP_SYS_RESOURCE CRIU complains about its own limit, and goes on.
		if !bytes.Contains(line, []byte("Error (")) || bytes.Contains(line, []byte("RLIMIT_NOFILE for self")) {
			continue
		}
		// "(00.123456)      1: Error (criu/file.c:1): text": time and process say
		// nothing to the reader of an error message.
		s := string(line)
		if i := strings.Index(s, "Error ("); i > 0 {
			s = s[i:]
		}
		if len(s) > 400 {
			s = s[:400]
		}
		out = append(out, s)
		if len(out) == 5 {
			break
		}
	}
	return strings.Join(out, "; ")
}
