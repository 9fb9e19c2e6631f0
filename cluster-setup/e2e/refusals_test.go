//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/tools/clone"
)

// refused creates a clone and expects that it does not take over: its condition says
// why in a sentence that has all the words, it has failed for good, and an event says
// the same.
func refused(ctx context.Context, t *testing.T, k *kit.Kit, source, name, node string, words []string, change ...func(*unstructured.Unstructured)) {
	t.Helper()
	if err := k.Clone(ctx, source, clone.Options{Name: name, Node: node}, change...); err != nil {
		t.Fatal(err)
	}
	expectRefusal(ctx, t, k, name, words)
}

func expectRefusal(ctx context.Context, t *testing.T, k *kit.Kit, name string, words []string) {
	t.Helper()
	p, err := k.WaitCloned(ctx, name)
	if !errors.Is(err, kit.ErrNotCloned) {
		t.Fatalf("the clone ended with %v", err)
	}
	c := kit.Condition(p, v1alpha1.ConditionCloned)
	for _, w := range words {
		if !strings.Contains(c.Message, w) {
			t.Errorf("%q is not in: %s", w, c.Message)
		}
	}
	if c.Reason == "" || p.Status.Phase != v1.PodFailed || p.Status.Reason != c.Reason || p.Status.Message != c.Message {
		t.Errorf("the clone is %s %s %q, its condition says %s %q", p.Status.Phase, p.Status.Reason, p.Status.Message, c.Reason, c.Message)
	}
	until(ctx, t, "an event says so", func() error {
		for _, e := range k.Events(ctx, name) {
			if e.Reason == c.Reason && e.Message == c.Message && e.Type == v1.EventTypeWarning {
				return nil
			}
		}
		return fmt.Errorf("no event %s: %s", c.Reason, c.Message)
	})
}

// set changes a field of a clone.
func set(value any, path ...string) func(*unstructured.Unstructured) {
	return func(u *unstructured.Unstructured) {
		if err := unstructured.SetNestedField(u.Object, value, path...); err != nil {
			panic(err)
		}
	}
}

// container changes the first container of a clone.
func container(change func(c map[string]any)) func(*unstructured.Unstructured) {
	return func(u *unstructured.Unstructured) {
		cs, _, _ := unstructured.NestedSlice(u.Object, "spec", "containers")
		change(cs[0].(map[string]any))
		_ = unstructured.SetNestedSlice(u.Object, cs, "spec", "containers")
	}
}

// add appends to a list of a clone.
func add(value map[string]any, path ...string) func(*unstructured.Unstructured) {
	return func(u *unstructured.Unstructured) {
		list, _, _ := unstructured.NestedSlice(u.Object, path...)
		_ = unstructured.SetNestedSlice(u.Object, append(list, value), path...)
	}
}

// A clone that could not go on as its source does is refused by what the two pods
// say, one sentence for each difference.
func TestClonesThatDifferAreRefused(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "counter-0", counterPod(""))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	for _, tc := range []struct {
		name   string
		change func(*unstructured.Unstructured)
		words  []string
	}{
		{"image", container(func(c map[string]any) { c["image"] = "podmig.dev/sequence:v1" }),
			[]string{`ontainer "counter" runs image "podmig.dev/counter:v1" in the source and "podmig.dev/sequence:v1" in the clone`, "give the clone the image of the source"}},
		{"volume", add(map[string]any{"name": "more", "emptyDir": map[string]any{}}, "spec", "volumes"),
			[]string{`olume "more" of the clone does not exist in the source`, "give the clone the volumes of the source"}},
		{"command", container(func(c map[string]any) { c["command"] = []any{"/counter", "again"} }),
			[]string{"ommand, args, workingDir, stdin or tty", "copy them from the source"}},
		{"memory", container(func(c map[string]any) { c["resources"] = map[string]any{"limits": map[string]any{"memory": "16Mi"}} }),
			[]string{"may use less memory in the clone (16Mi) than in the source (no limit)", "at least the memory limit of the source"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			refused(ctx, t, k, p.Name, tc.name, node2, tc.words, tc.change)
			undisturbed(ctx, t, k, p, before)
		})
	}
	t.Run("same node", func(t *testing.T) {
		refused(ctx, t, k, p.Name, "same-node", node2, []string{"runs on node node1 itself", "place the clone on another node"},
			func(u *unstructured.Unstructured) {
				unstructured.RemoveNestedField(u.Object, "spec", "affinity")
				bindTo(node1)(u)
			})
		undisturbed(ctx, t, k, p, before)
	})
	// More than its source no clone may have: that is refused by the API server.
	t.Run("another container", func(t *testing.T) {
		more := add(map[string]any{"name": "second", "image": "podmig.dev/sequence:v1", "imagePullPolicy": "Never"}, "spec", "containers")
		denied(t, k.Clone(ctx, p.Name, clone.Options{Name: "more", Node: node2}, more), `spec.containers[1].name`, "has no such container")
		undisturbed(ctx, t, k, p, before)
	})
	move(ctx, t, k, p.Name, "counter-9", node2)
}

// denied expects that the API server did not let a clone be created.
func denied(t *testing.T, err error, words ...string) {
	t.Helper()
	if !apierrors.IsForbidden(err) {
		t.Fatalf("the attempt ended with %v", err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q is not in: %v", w, err)
		}
	}
}

// What is no running pod of the namespace cannot be taken over.
func TestSourcesThatDoNotRunAreRefused(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	const text = `
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: node1
  restartPolicy: %s
  terminationGracePeriodSeconds: 0
  containers:
  - {name: first, image: "podmig.dev/%s:v1", imagePullPolicy: Never, command: [%s]}
  - {name: second, image: "podmig.dev/python:v1", imagePullPolicy: Never, command: [%s]}
`
	sources := strings.Join([]string{
		fmt.Sprintf(text, "waits", "Always", "there-is-no-such-image", "sleep, infinity", "sleep, infinity"),
		fmt.Sprintf(text, "half", "Never", "python", "sleep, infinity", "sh, -c, exit"),
		fmt.Sprintf(text, "ended", "Never", "python", "sh, -c, exit", "sh, -c, exit"),
		fmt.Sprintf(text, "leaves", "Never", "python", "sleep, infinity", "sleep, infinity"),
	}, "\n---")
	if err := k.Create(ctx, sources); err != nil {
		t.Fatal(err)
	}
	is := func(name, what string, f func(*v1.Pod) bool) {
		t.Helper()
		if _, err := k.WaitPod(ctx, name, what, func(p *v1.Pod) (bool, error) { return f(p), nil }); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("pending", func(t *testing.T) {
		is("waits", "waiting", func(p *v1.Pod) bool { return len(p.Status.ContainerStatuses) == 2 })
		refused(ctx, t, k, "waits", "c-waits", node2, []string{`ource pod "waits" is Pending, not Running`, "wait until it runs"})
	})
	t.Run("one container ended", func(t *testing.T) {
		is("half", "half ended", func(p *v1.Pod) bool { return containerStatuses(p)["second"].State.Terminated != nil })
		refused(ctx, t, k, "half", "c-half", node2, []string{`ontainer "second" of source pod "half" is not running`, "wait until every container of the pod runs"})
	})
	t.Run("one container left out", func(t *testing.T) {
		is("leaves", "running", func(p *v1.Pod) bool { return p.Status.Phase == v1.PodRunning })
		refused(ctx, t, k, "leaves", "c-less", node2, []string{`ontainer "second" of the source is missing in the clone`, "give the clone exactly the containers of the source"},
			func(u *unstructured.Unstructured) {
				cs, _, _ := unstructured.NestedSlice(u.Object, "spec", "containers")
				_ = unstructured.SetNestedSlice(u.Object, cs[:1], "spec", "containers")
			})
	})
	// The API server knows these two itself: there will be no clone.
	t.Run("ended", func(t *testing.T) {
		is("ended", "ended", func(p *v1.Pod) bool { return p.Status.Phase == v1.PodSucceeded })
		denied(t, k.Clone(ctx, "ended", clone.Options{Name: "c-ended", Node: node2}), `the pod "ended" has finished (Succeeded)`, "only a running pod can be cloned")
	})
	t.Run("unknown", func(t *testing.T) {
		err := k.Clone(ctx, "half", clone.Options{Name: "c-unknown", Node: node2}, set("nobody", "spec", "clonePod"))
		denied(t, err, `there is no pod "nobody" in namespace`, "name a running pod of the same namespace")
	})
	t.Run("another namespace's name", func(t *testing.T) {
		other, err := admin.In(ctx, "default")
		if err != nil {
			t.Fatal(err)
		}
		err = k.Clone(ctx, "half", clone.Options{Name: "c-foreign", Node: node2}, set("half", "spec", "clonePod"), func(u *unstructured.Unstructured) {
			u.SetNamespace(other.Namespace)
		})
		if err == nil {
			t.Fatal("a clone was created from one namespace into another")
		}
	})
	// A source can go between the API server's look and the kubelet's.
	t.Run("gone meanwhile", func(t *testing.T) {
		is("leaves", "running", func(p *v1.Pod) bool { return p.Status.Phase == v1.PodRunning })
		gates := set([]any{map[string]any{"name": "podmig.dev/wait"}}, "spec", "schedulingGates")
		if err := k.Clone(ctx, "leaves", clone.Options{Name: "c-leaves", Node: node2}, gates); err != nil {
			t.Fatal(err)
		}
		if err := k.Delete(ctx, "leaves"); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Kubectl(ctx, "patch", "pod", "c-leaves", "--type=json", "-p", `[{"op":"remove","path":"/spec/schedulingGates"}]`); err != nil {
			t.Fatal(err)
		}
		expectRefusal(ctx, t, k, "c-leaves", []string{`There is no pod "leaves" in namespace`, "create the pod without clonePod, or name a running pod"})
	})
}

// pythonSource is a pod whose process says "ready" when it has what must stop a move.
func pythonSource(name, program, container, pod string) string {
	lines := strings.ReplaceAll(strings.TrimSpace(program), "\n", "\n      ")
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
%s
  containers:
  - name: python
    image: podmig.dev/python:v1
    imagePullPolicy: Never
    command: [python3, -c]
    args:
    - |
      import ctypes, os, socket, time
      %s
      open("/tmp/ready", "w").write(str(os.getpid()) + " " + str(time.time()))
      while True: time.sleep(1)
    readinessProbe: {exec: {command: [test, -s, /tmp/ready]}, periodSeconds: 1, timeoutSeconds: 5}
%s
`, name, pod, lines, container)
}

// What only the processes know, the runtime finds while they run, and nothing happens
// to them.
func TestWhatCannotBeDumpedIsRefused(t *testing.T) {
	ctx, k := begin(t, 90*time.Second)
	for _, tc := range []struct {
		name, program, container, pod string
		words                         []string
	}{
		{name: "hostpath", program: "pass", container: "    volumeMounts: [{name: host, mountPath: /host}]", pod: "  volumes: [{name: host, hostPath: {path: /tmp}}]",
			words: []string{`olume "host" is the path /tmp of the source node, which does not move`, "use an emptyDir volume"}},
		{name: "device", program: "pass", container: "    volumeMounts: [{name: fuse, mountPath: /dev/fuse}]", pod: "  volumes: [{name: fuse, hostPath: {path: /dev/fuse, type: CharDevice}}]",
			words: []string{`olume "fuse" is the path /dev/fuse of the source node, which does not move`}},
		{name: "iouring", program: `
p = (ctypes.c_char * 120)()
f = ctypes.CDLL(None, use_errno=True).syscall(425, 8, p)
assert f >= 0, os.strerror(ctypes.get_errno())`,
			words: []string{"uses io_uring, which CRIU can not dump", "turn io_uring off in the program"}},
		{name: "mptcp", program: `
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
s.bind(("0.0.0.0", 7777)); s.listen()`,
			words: []string{"has a multipath TCP socket on 0.0.0.0:7777", "turn multipath TCP off"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := start(ctx, t, k, tc.name, pythonSource(tc.name, tc.program, tc.container, tc.pod))
			said := execIn(ctx, t, k, p.Name, "python", "cat", "/tmp/ready")
			refused(ctx, t, k, p.Name, "c-"+tc.name, node2, tc.words)
			if now := execIn(ctx, t, k, p.Name, "python", "cat", "/tmp/ready"); now != said {
				t.Errorf("the process was started again: %s, before it was %s", now, said)
			}
			now, err := k.Pod(ctx, p.Name)
			if err != nil {
				t.Fatal(err)
			}
			if s := now.Status.ContainerStatuses[0]; now.Status.Phase != v1.PodRunning || s.RestartCount != 0 {
				t.Errorf("the source is %s, restarted %d times", now.Status.Phase, s.RestartCount)
			}
			for _, e := range k.Events(ctx, p.Name) {
				if strings.HasPrefix(e.Reason, "Migration") {
					t.Errorf("the source was touched: %s: %s", e.Reason, e.Message)
				}
			}
		})
	}
}
