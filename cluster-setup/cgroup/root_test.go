//go:build root

package cgroup

// These tests make control groups in the host's trees. The version 2 part runs wherever such a tree is mounted, also where it has no
// controllers; what it cannot show there is that controllers reach the kubelet.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func layouts(t *testing.T) map[string]Layout {
	t.Helper()
	whole, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]Layout{"as mounted": whole}
	if i := slices.IndexFunc(whole.Hierarchies, func(h Hierarchy) bool { return h.V2 }); i >= 0 {
		all["version 2"] = Layout{Mode: V2, Root: whole.Hierarchies[i].MountPoint, Hierarchies: whole.Hierarchies[i : i+1]}
	}
	return all
}

func TestLifeOfAGroup(t *testing.T) {
	for name, layout := range layouts(t) {
		t.Run(name, func(t *testing.T) {
			path := fmt.Sprintf("/podmig-test-%d", os.Getpid())
			leaf := filepath.Join(path, "a", "b")
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			t.Cleanup(func() {
				_ = layout.Kill(context.Background(), path)
				_ = layout.Remove(ctx, path)
			})
			if err := layout.Create(leaf); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("sleep", "1000")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			if err := layout.Join(leaf, cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if pids, err := layout.PIDs(path); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
				t.Errorf("got %v, %v, want %d", pids, err, cmd.Process.Pid)
			}
			if !freeze(layout, leaf) {
				t.Error("the group cannot be frozen")
			}
			if err := layout.Kill(ctx, path); err != nil {
				t.Fatal(err)
			}
			<-ended
			if err := layout.Remove(ctx, path); err != nil {
				t.Fatal(err)
			}
			if layout.Exists(path) {
				t.Error("the group is left")
			}
			// Nothing to do is no failure.
			if err := layout.Kill(ctx, path); err != nil {
				t.Error(err)
			}
			if err := layout.Remove(ctx, path); err != nil {
				t.Error(err)
			}
		})
	}
}

func freeze(layout Layout, path string) bool {
	frozen := false
	for _, hierarchy := range layout.Hierarchies {
		for name, value := range map[string]string{"freezer.state": "FROZEN", "cgroup.freeze": "1"} {
			file, err := os.OpenFile(filepath.Join(hierarchy.MountPoint, path, name), os.O_WRONLY, 0)
			if err != nil {
				continue
			}
			if _, err := file.WriteString(value); err == nil {
				frozen = true
			}
			file.Close()
		}
	}
	return frozen
}
