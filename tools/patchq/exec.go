package patchq

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// CommandError is a failed command with what a reader needs to repeat it.
type CommandError struct {
	Command string
	Output  string
	Err     error
}

// Error shows the command, the reason and the last lines of its output.
func (e *CommandError) Error() string {
	text := strings.TrimSpace(e.Output)
	if lines := strings.Split(text, "\n"); len(lines) > 40 {
		text = strings.Join(lines[len(lines)-40:], "\n")
	}
	return fmt.Sprintf("%s: %v\n%s", e.Command, e.Err, text)
}

// Unwrap returns the cause.
func (e *CommandError) Unwrap() error { return e.Err }

// output runs a command and returns its standard output; the error carries both streams.
func output(cmd *exec.Cmd) ([]byte, error) {
	var out, all bytes.Buffer
	cmd.Stdout = &teeBuffer{&out, &all}
	cmd.Stderr = &all
	if err := cmd.Run(); err != nil {
		return out.Bytes(), &CommandError{Command: strings.Join(cmd.Args, " "), Output: all.String(), Err: err}
	}
	return out.Bytes(), nil
}

type teeBuffer struct{ a, b *bytes.Buffer }

func (t *teeBuffer) Write(p []byte) (int, error) {
	t.a.Write(p)
	return t.b.Write(p)
}

// gitEnv hides the developer's git configuration and every repository above dir.
func gitEnv(dir string) []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "GIT_") {
			env = append(env, kv)
		}
	}
	return append(env,
		"GIT_CONFIG_GLOBAL="+os.DevNull,
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_CEILING_DIRECTORIES="+filepath.Dir(dir),
		"GIT_AUTHOR_NAME="+patchAuthor, "GIT_AUTHOR_EMAIL="+patchEmail,
		"GIT_COMMITTER_NAME="+patchAuthor, "GIT_COMMITTER_EMAIL="+patchEmail,
		"GIT_COMMITTER_DATE="+patchDate, "GIT_AUTHOR_DATE="+patchDate,
		"LC_ALL=C",
	)
}

// Patches are effects, not history: one author and one date keep an extracted patch equal to the committed one.
const (
	patchAuthor = "podmig"
	patchEmail  = "patches@podmig.dev"
	patchDate   = "2026-01-01T00:00:00Z"
)

// git runs git in dir, which must be absolute.
func git(dir string, args ...string) ([]byte, error) {
	return output(gitCommand(dir, args...))
}

func gitCommand(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = gitEnv(dir)
	return cmd
}
