//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/tools/clone"
)

// outside is a client in the cluster's network that is in no pod. It keeps no
// connections: one that it kept would be closed by a move.
var outside = &http.Client{
	Timeout: 10 * time.Second,
	Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return admin.Cluster.Hub().Dial(ctx, network, address)
		},
	},
}

// ask sends a request to a port of a pod and returns the answer's body.
func ask(ctx context.Context, method string, p *v1.Pod, port int, path string) (string, error) {
	url := fmt.Sprintf("http://%s%s", net.JoinHostPort(p.Status.PodIP, fmt.Sprint(port)), path)
	r, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := outside.Do(r)
	if err != nil {
		return "", fmt.Errorf("ask pod %s: %w", p.Name, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("ask pod %s: %w", p.Name, err)
	}
	if resp.StatusCode/100 != 2 {
		return "", fmt.Errorf("ask pod %s: %s: %s", p.Name, resp.Status, b)
	}
	return strings.TrimSpace(string(b)), nil
}

// get is ask for tests that cannot go on without the answer.
func get(ctx context.Context, t *testing.T, p *v1.Pod, port int, path string) string {
	t.Helper()
	s, err := ask(ctx, http.MethodGet, p, port, path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// getJSON decodes the answer of a pod.
func getJSON[T any](ctx context.Context, t *testing.T, p *v1.Pod, port int, path string) T {
	t.Helper()
	var v T
	body := get(ctx, t, p, port, path)
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatalf("answer of pod %s: %v:\n%s", p.Name, err, body)
	}
	return v
}

// until repeats a question that has no event to wait for.
func until(ctx context.Context, t *testing.T, what string, ask func() error) {
	t.Helper()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("wait until %s: %v: %v", what, ctx.Err(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// run creates a pod and waits until it is ready.
func start(ctx context.Context, t *testing.T, k *kit.Kit, name, text string) *v1.Pod {
	t.Helper()
	if err := k.Create(ctx, text); err != nil {
		t.Fatal(err)
	}
	p, err := k.WaitRunning(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// move moves a pod and waits until its clone is ready.
func move(ctx context.Context, t *testing.T, k *kit.Kit, source, name, node string) *v1.Pod {
	t.Helper()
	if _, err := k.Move(ctx, source, clone.Options{Name: name, Node: node}); err != nil {
		t.Fatal(err)
	}
	p, err := k.WaitRunning(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if p.Spec.NodeName != node {
		t.Fatalf("the clone is on %s and not on %s", p.Spec.NodeName, node)
	}
	return p
}
