package netns

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/cluster-setup/supervisor"
)

// initialize is a machine's first process. It returns only when the machine cannot be set up or was told to end.
func initialize(specPath string) error {
	spec, err := readSpec(specPath)
	if err != nil {
		return err
	}
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return fmt.Errorf("nobody released this machine: %w", err)
	}
	// Opened before the root changes: its name is one of the host's.
	listener, err := supervisor.Listen(filepath.Join(spec.Dir, socketFile))
	if err != nil {
		return err
	}
	if spec.RootFS == "" {
		err = stayInRoot()
	} else {
		err = enterRoot(spec)
	}
	if err != nil {
		return err
	}
	for _, setting := range sysctls {
		if err := os.WriteFile("/proc/sys/net/"+setting.name, []byte(setting.value), 0o644); err != nil {
			return fmt.Errorf("set network option: %w", err)
		}
	}
	if err := unix.Sethostname([]byte(spec.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	ready, err := detach()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	if _, err := ready.WriteString("ready\n"); err != nil {
		return fmt.Errorf("report readiness: %w", err)
	}
	ready.Close()
	return supervisor.Serve(ctx, listener, spec.Supervision)
}

// detach lets go of the caller's pipes: input becomes the null device, output the log. It returns the pipe to the caller.
func detach() (*os.File, error) {
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("keep pipe to caller: %w", err)
	}
	ready := os.NewFile(uintptr(fd), "caller")
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("open null device: %w", err)
	}
	defer null.Close()
	if err := errors.Join(unix.Dup3(int(null.Fd()), 0, 0), unix.Dup3(2, 1, 0)); err != nil {
		return nil, fmt.Errorf("leave caller's files: %w", err)
	}
	return ready, nil
}

// sysctls of the machine's network namespace: it routes for its pods, whose packets may arrive on any interface.
var sysctls = []struct{ name, value string }{
	{"ipv4/ip_forward", "1"},
	{"ipv4/conf/all/rp_filter", "0"},
	{"ipv4/conf/default/rp_filter", "0"},
	{"ipv6/conf/all/disable_ipv6", "1"},
	{"ipv6/conf/default/disable_ipv6", "1"},
}
