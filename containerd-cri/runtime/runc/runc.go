package runc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"podmig.dev/podmig/containerd-cri/checkpoint"
	"podmig.dev/podmig/containerd-cri/runtime"
)

// Runtime implements runtime.Runtime. The zero value is ready to use.
type Runtime struct {
	cgroups cgroups
}

var _ runtime.Runtime = (*Runtime)(nil)

// New returns the runtime of this node.
func New() *Runtime { return &Runtime{} }

// CRIUOptions are what a dump and a restore of a pod need of CRIU beyond what
// runc sets, in the form of CRIU's configuration file.
//
// Established connections are closed on the target: its pod has another address.
// The network is not locked, because nothing has to be kept in it. Ghost files
// (deleted but open) are copied up to a size that is still far below memory sizes.
const CRIUOptions = "tcp-close\nnetwork-lock skip\nghost-limit 67108864\nfile-locks\nskip-in-flight\n"

// Dump implements runtime.Runtime.
func (r *Runtime) Dump(ctx context.Context, c runtime.Container, dir string, out *checkpoint.Writer, round uint32) (runtime.Dumped, error) {
	var res runtime.Dumped
	images, work := filepath.Join(dir, "images"), filepath.Join(dir, "work")
	for _, d := range []string{images, work} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return res, err
		}
	}
	conf := filepath.Join(dir, "criu.conf")
	if err := os.WriteFile(conf, []byte(CRIUOptions), 0o600); err != nil {
		return res, err
	}
	start := time.Now()
	cmd := exec.CommandContext(ctx, c.OCIBinary, "--root", c.OCIRoot, "checkpoint", "--leave-running",
		"--image-path", images, "--work-path", work, c.ID)
	cmd.Env = append(os.Environ(), "CRIU_CONFIG_FILE="+conf)
	if b, err := cmd.CombinedOutput(); err != nil {
		return res, dumpError(c, err, b, filepath.Join(work, "dump.log"))
	}
	res.Duration = time.Since(start)
	if frozen, err := r.Frozen(ctx, c); err != nil || !frozen {
		return res, errors.Join(fmt.Errorf("container %s is not frozen after the dump", c.Name), err)
	}
	return res, r.send(ctx, c, images, out)
}

func (r *Runtime) send(ctx context.Context, c runtime.Container, images string, out *checkpoint.Writer) error {
	files, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	buf := make([]byte, checkpoint.MaxData)
	for _, e := range files {
		if err := sendFile(ctx, filepath.Join(images, e.Name()), checkpoint.Part{Kind: checkpoint.KindImage, Container: c.Name, Name: e.Name()}, out, buf); err != nil {
			return err
		}
	}
	return nil
}

func sendFile(ctx context.Context, file string, part checkpoint.Part, out *checkpoint.Writer, buf []byte) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	w, err := out.Begin(part)
	if err != nil {
		return err
	}
	var off int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		if n > 0 {
			if err := w.Data(off, buf[:n]); err != nil {
				return err
			}
			off += int64(n)
		}
		if n == 0 || err != nil {
			break
		}
	}
	return w.Close()
}

// Recover implements runtime.Runtime.
func (r *Runtime) Recover(ctx context.Context, c runtime.Container, dir string) error {
	return r.Freeze(ctx, []runtime.Container{c})
}

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
		if !bytes.Contains(line, []byte("Error (")) {
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
