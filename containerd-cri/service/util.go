package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOMEM)
}

func marshal(m proto.Message) ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

func checkVolumes(vs []*migration.Volume) error {
	seen := map[string]bool{}
	for _, v := range vs {
		if v.Name == "" || seen[v.Name] {
			return invalid("a volume has no name or that of another one: %q", v.Name)
		}
		seen[v.Name] = true
		if !filepath.IsAbs(v.HostPath) || filepath.Clean(v.HostPath) != v.HostPath {
			return invalid("volume %s has path %q, which is not a clean absolute path", v.Name, v.HostPath)
		}
		if st, err := os.Lstat(v.HostPath); err != nil || !st.IsDir() {
			return invalid("volume %s has path %q, which is no directory", v.Name, v.HostPath)
		}
	}
	return nil
}

// listen opens the stream socket of a session. The directory admits root only, so
// there is no instant at which somebody else could connect.
func listen(dir string) (net.Listener, string, error) {
	path := filepath.Join(dir, "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, "", err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, "", err
	}
	return l, "unix://" + path, nil
}

// acceptOne waits for the only peer of a stream and closes the door behind it. It
// returns nil when the session ends first.
func acceptOne(ctx context.Context, l net.Listener) net.Conn {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	conn, err := l.Accept()
	l.Close()
	if err != nil {
		return nil
	}
	return conn
}

// openRegular opens a file that is neither a link nor anything but a plain file
// with one name.
func openRegular(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		f.Close()
		return nil, fmt.Errorf("%s is not a plain file", path)
	}
	return f, nil
}
