package netns

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Names of the hidden subcommands of every program that starts machines: it is called again as their launcher and first process.
const (
	launchCommand = "machine-launch"
	initCommand   = "machine-init"
)

// Main must be called first in every program that starts machines. It returns false when the program was called by its user, and
// otherwise does its part as launcher or first process.
func Main(args []string) (bool, error) {
	if len(args) != 3 {
		return false, nil
	}
	switch args[1] {
	case launchCommand:
		return true, launch(args[2])
	case initCommand:
		return true, initialize(args[2])
	default:
		return false, nil
	}
}

// Start brings a machine up in three steps: the launcher joins the control groups and clones the first process into new
// namespaces; connect wires its network from outside; then the first process is released and sets up the rest. A caller that dies
// in between takes the machine with it, because the first process waits for its word.
func Start(ctx context.Context, spec Spec, connect func(pid int) error) (_ Machine, err error) {
	machine := spec.Handle()
	defer func() {
		if err != nil {
			err = fmt.Errorf("start %s: %w%s", spec.Name, err, machine.lastWords())
		}
	}()
	for _, dir := range []string{upperDir, workDir, mergedDir, diskDir, logDir} {
		if err := os.MkdirAll(filepath.Join(spec.Dir, dir), 0o755); err != nil {
			return machine, err
		}
	}
	path, err := spec.write()
	if err != nil {
		return machine, err
	}
	if err := spec.Layout.Create(spec.Cgroup); err != nil {
		return machine, err
	}
	log, err := os.OpenFile(filepath.Join(machine.Logs(), "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return machine, err
	}
	defer log.Close()
	// The caller's ends of two pipes: one word goes in, two lines come out.
	childIn, word, err := os.Pipe()
	if err != nil {
		return machine, err
	}
	defer word.Close()
	news, childOut, err := os.Pipe()
	if err != nil {
		childIn.Close()
		return machine, err
	}
	defer news.Close()
	launcher := exec.CommandContext(ctx, "/proc/self/exe", launchCommand, path)
	launcher.Stdin, launcher.Stdout, launcher.Stderr = childIn, childOut, log
	launcher.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = launcher.Start()
	childIn.Close()
	childOut.Close()
	if err != nil {
		return machine, err
	}
	defer func() {
		// After a success it has been waited for already.
		if launcher.ProcessState == nil {
			_ = launcher.Wait()
		}
	}()
	stop := context.AfterFunc(ctx, func() { news.Close() })
	defer stop()
	lines := bufio.NewReader(news)
	line, err := lines.ReadString('\n')
	if err != nil {
		return machine, fmt.Errorf("launcher ended early: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return machine, fmt.Errorf("launcher said %q", line)
	}
	if err := os.WriteFile(filepath.Join(spec.Dir, pidFile), fmt.Appendln(nil, pid), 0o644); err != nil {
		return machine, err
	}
	// Version 2 control groups can be handed on only when nobody but the first process is left in the machine's own.
	if err := launcher.Wait(); err != nil {
		return machine, fmt.Errorf("launcher: %w", err)
	}
	if err := connect(pid); err != nil {
		return machine, err
	}
	if _, err := word.WriteString("go\n"); err != nil {
		return machine, fmt.Errorf("release first process: %w", err)
	}
	if line, err = lines.ReadString('\n'); err != nil || line != "ready\n" {
		return machine, fmt.Errorf("first process ended early: %w", err)
	}
	return machine, nil
}

// lastWords quotes the end of the first process's log.
func (m Machine) lastWords() string {
	content, err := os.ReadFile(filepath.Join(m.Logs(), "init.log"))
	if err != nil || len(content) == 0 {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	return ": " + lines[len(lines)-1]
}

// launch is the launcher: it moves itself into the control groups first, so that the cgroup namespace which the
// clone call makes begins there.
func launch(specPath string) error {
	spec, err := readSpec(specPath)
	if err != nil {
		return err
	}
	if err := spec.Layout.Join(spec.Cgroup, os.Getpid()); err != nil {
		return err
	}
	init := exec.Command("/proc/self/exe", initCommand, specPath)
	init.Stdin, init.Stdout, init.Stderr = os.Stdin, os.Stdout, os.Stderr
	init.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	init.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS |
			unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
	}
	if err := init.Start(); err != nil {
		return fmt.Errorf("clone first process: %w", err)
	}
	if _, err := fmt.Println(init.Process.Pid); err != nil {
		return fmt.Errorf("report first process: %w", err)
	}
	return nil
}
