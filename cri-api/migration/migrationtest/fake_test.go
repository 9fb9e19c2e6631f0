package migrationtest

import (
	"fmt"
	"net"
	"os"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	migration "podmig.dev/podmig/cri-api/migration/v1alpha1"
)

// serve runs a fake behind a socket, the way a kubelet sees a runtime.
func serve(t *testing.T, r *Runtime) migration.MigrationServiceClient {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/cri.sock")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	migration.RegisterMigrationServiceServer(srv, r)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
	conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return migration.NewMigrationServiceClient(conn)
}

func TestFakeConforms(t *testing.T) {
	// Not t.TempDir: its long name leaves no room for the path of a socket.
	dir, err := os.MkdirTemp("", "fake")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := New(dir)
	client := serve(t, r)
	pods := 0
	pod := func(n int, state State) Pod {
		pods++
		p := Pod{SandboxID: fmt.Sprintf("sandbox%d", pods), Volumes: []*migration.Volume{{Name: "data", HostPath: dir}}}
		for i := range n {
			name := fmt.Sprintf("c%d", i)
			p.Containers = append(p.Containers, &migration.CheckpointContainer{ContainerId: r.Add(p.SandboxID, name, state), Name: name})
		}
		return p
	}
	Conformance(t, Env{
		Source: client, Target: client,
		RunPod:    func(_ *testing.T, n int) Pod { return pod(n, Running) },
		CreatePod: func(_ *testing.T, n int) Pod { return pod(n, Created) },
		State:     func(_ *testing.T, id string) State { return r.State(id) },
		Count:     r.Count,
	})
	if n := r.Sessions(); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}
