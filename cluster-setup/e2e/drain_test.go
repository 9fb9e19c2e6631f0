//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/deferral"
)

const migratingRedis = `
apiVersion: podmig.dev/v1alpha1
kind: MigratingPod
metadata: {name: redis}
spec:
  template:
    metadata: {labels: {app: redis}}
    spec:
      # The first one is where the test drains.
      affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}}]}}
      containers:
      - name: redis
        image: podmig.dev/redis:v1
        imagePullPolicy: Never
        readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
`

const redisService = `
apiVersion: v1
kind: Service
metadata: {name: redis}
spec:
  selector: {app: redis}
  ports: [{port: 6379}]
`

// trafficPod counts in redis through the Service all the time and prints when and what it
// got, or that it got nothing.
const trafficPod = `
apiVersion: v1
kind: Pod
metadata: {name: traffic}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers:
  - name: traffic
    image: podmig.dev/python:v1
    imagePullPolicy: Never
    command:
    - python3
    - -c
    - |
      import os, socket, time
      s = None
      while True:
          try:
              if s is None:
                  s = socket.create_connection((os.environ["REDIS_SERVICE_HOST"], 6379), timeout=1)
              s.sendall(b"INCR n\r\n")
              answer = s.recv(64)
              if not answer.startswith(b":"):
                  raise OSError("no number")
              print(time.time(), int(answer[1:]))
          except OSError:
              print(time.time(), "failed")
              s = None
          time.sleep(0.01)
`

// drain calls kubectl drain and makes the node schedulable again after the test.
func drain(ctx context.Context, t *testing.T, k *kit.Kit, node string) error {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		if _, err := k.Kubectl(ctx, "uncordon", node); err != nil {
			t.Error(err)
		}
	})
	// Of the pods of all namespaces only those of the test are its business.
	_, err := k.Kubectl(ctx, "drain", node, "--timeout=90s", "--ignore-daemonsets", "--force", "--pod-selector=app in (redis,web)")
	return err
}

// follow calls f with every change of the pods of a namespace, until stop is called.
func follow(ctx context.Context, t *testing.T, k *kit.Kit, f func(kind watch.EventType, p *v1.Pod)) (stop func()) {
	t.Helper()
	w, err := k.Client.CoreV1().Pods(k.Namespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	ended.Go(func() {
		for e := range w.ResultChan() {
			if p, ok := e.Object.(*v1.Pod); ok {
				f(e.Type, p)
			}
		}
	})
	return func() { w.Stop(); ended.Wait() }
}

func migratingPod(ctx context.Context, t *testing.T, k *kit.Kit, name string) *v1alpha1.MigratingPod {
	t.Helper()
	u, err := k.Dynamic.Resource(v1alpha1.GroupVersion.WithResource("migratingpods")).Namespace(k.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mp := &v1alpha1.MigratingPod{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, mp); err != nil {
		t.Fatal(err)
	}
	return mp
}

// A node is drained under a redis that a client counts in through a Service.
func TestDrainMovesAMigratingPod(t *testing.T) {
	ctx, k := begin(t, 4*time.Minute)
	install(ctx, t)
	apply(ctx, t, k, redisService+"---"+migratingRedis)
	until(ctx, t, "its pod is ready", func() error {
		mp := migratingPod(ctx, t, k, "redis")
		if mp.Status.State != v1alpha1.StateRunning || mp.Status.ActivePod != "redis-0" {
			return fmt.Errorf("it is %+v", mp.Status)
		}
		return nil
	})
	if _, err := k.WaitRunning(ctx, "redis-0"); err != nil {
		t.Fatal(err)
	}
	r := redis{k, "redis-0"}
	id, _ := r.server(ctx, t)
	start(ctx, t, k, "traffic", trafficPod)
	traffic := func() string {
		t.Helper()
		log, err := k.Logs(ctx, "traffic", "traffic")
		if err != nil {
			t.Fatal(err)
		}
		return log
	}
	until(ctx, t, "the client counts", func() error {
		if n := strings.Count(traffic(), "\n"); n < 50 {
			return fmt.Errorf("%d answers", n)
		}
		return nil
	})

	// When a pod ended, and which endpoints were ready when.
	var mu sync.Mutex
	failed := map[string]time.Time{}
	stopPods := follow(ctx, t, k, func(_ watch.EventType, p *v1.Pod) {
		mu.Lock()
		defer mu.Unlock()
		if _, ok := failed[p.Name]; !ok && deferral.Ended(p) {
			failed[p.Name] = time.Now()
		}
	})
	type view struct {
		at    time.Time
		ready []string
	}
	var views []view
	w, err := k.Client.DiscoveryV1().EndpointSlices(k.Namespace).Watch(ctx, metav1.ListOptions{LabelSelector: discovery.LabelServiceName + "=redis"})
	if err != nil {
		t.Fatal(err)
	}
	var watching sync.WaitGroup
	watching.Go(func() {
		for e := range w.ResultChan() {
			if s, ok := e.Object.(*discovery.EndpointSlice); ok {
				views = append(views, view{time.Now(), ready([]discovery.EndpointSlice{*s})})
			}
		}
	})
	if err := drain(ctx, t, k, node1); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "it runs on the other node", func() error {
		mp := migratingPod(ctx, t, k, "redis")
		if mp.Status.State != v1alpha1.StateRunning || mp.Status.ActivePod != "redis-1" || mp.Status.NodeName != node2 || mp.Status.Moves != 1 {
			return fmt.Errorf("it is %+v", mp.Status)
		}
		return nil
	})
	r.pod = "redis-1"
	if now, _ := r.server(ctx, t); now != id {
		t.Error("it is another redis")
	}
	answers := strings.Count(traffic(), "\n")
	until(ctx, t, "the client counts again", func() error {
		lines := strings.Split(strings.TrimSpace(traffic()), "\n")
		if len(lines) < answers+100 || strings.HasSuffix(lines[len(lines)-1], "failed") {
			return fmt.Errorf("%d answers, the last one %q", len(lines)-answers, lines[len(lines)-1])
		}
		return nil
	})
	stopPods()
	w.Stop()
	watching.Wait()

	// Endpoints: one at a time that is ready, and none that has ended for longer than the
	// endpoints' controller needs to notice.
	for i, one := range views {
		until := time.Now()
		if i+1 < len(views) {
			until = views[i+1].at
		}
		for _, name := range one.ready {
			if end, ok := failed[name]; ok && until.Sub(end) > 2*time.Second {
				t.Errorf("%s was a ready endpoint %s after its end", name, until.Sub(end))
			}
		}
	}
	// Answers: no number twice, none lost that was answered, and failures in one piece.
	type outage struct {
		// from the last answer before to the first one after.
		from, to float64
		failed   int
	}
	var outages []outage
	last, lost := 0, 0
	answered := 0.0
	for line := range strings.SplitSeq(strings.TrimSpace(traffic()), "\n") {
		at, what, ok := strings.Cut(line, " ")
		when, err := strconv.ParseFloat(at, 64)
		if !ok || err != nil {
			t.Fatalf("the client printed %q", line)
		}
		now := len(outages) - 1
		out := now >= 0 && outages[now].to == 0
		if what == "failed" {
			if !out {
				outages = append(outages, outage{from: answered})
				now++
			}
			outages[now].failed++
			continue
		}
		n, err := strconv.Atoi(what)
		if err != nil {
			t.Fatalf("the client printed %q", line)
		}
		if n <= last {
			t.Errorf("the count went from %d to %d", last, n)
		}
		lost += n - last - 1
		last, answered = n, when
		if out {
			outages[now].to = when
		}
	}
	failures := 0
	for _, o := range outages {
		failures += o.failed
		t.Logf("%.3fs without an answer, %d requests failed, %.3fs after the first failure", o.to-o.from, o.failed, o.from-outages[0].from)
	}
	if lost > failures {
		t.Errorf("%d counts without an answer, and only %d requests failed", lost, failures)
	}
	if len(outages) > 1 {
		t.Errorf("requests failed %d times", len(outages))
	}
	if len(outages) > 0 && outages[0].to-outages[0].from > 10 {
		t.Error("requests failed for longer than a move takes")
	}
	for _, v := range views {
		t.Logf("%.3f ready endpoints %v", float64(v.at.UnixMicro())/1e6-outages[0].from, v.ready)
	}
	for name, at := range failed {
		t.Logf("%.3f %s ended", float64(at.UnixMicro())/1e6-outages[0].from, name)
	}
}

const webDeployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  strategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
  template:
    metadata: {labels: {app: web}, finalizers: [podmig.dev/migrate]}
    spec:
      terminationGracePeriodSeconds: 1
      affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}}]}}
      containers:
      - name: counter
        image: podmig.dev/counter:v1
        imagePullPolicy: Never
        readinessProbe: {httpGet: {path: /status, port: 8080}, periodSeconds: 1}
`

// observed is what the API server showed of a Deployment while its pods moved.
type observed struct {
	mu   sync.Mutex
	pods map[string]*v1.Pod
	// fresh are pods that were neither there in the beginning nor clones.
	fresh []string
	// counts are the numbers of replicas that there were, by the pods themselves, and those
	// that the ReplicaSets' status gave.
	counts, statuses map[int]bool
	// cloned is closed with the first clone.
	cloned chan struct{}
	// story has the pods that counted when there was a number of them for the first time.
	story []string
}

func (o *observed) pod(kind watch.EventType, p *v1.Pod) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.pods[p.Name]; !known && kind == watch.Added && p.Spec.ClonePod == "" {
		o.fresh = append(o.fresh, p.Name)
	}
	if o.pods[p.Name] = p; kind == watch.Deleted {
		delete(o.pods, p.Name)
	}
	var all []*v1.Pod
	for _, p := range o.pods {
		all = append(all, p)
	}
	counted, _ := deferral.Replicas(all, func(p *v1.Pod) string { return p.Spec.ClonePod }, time.Now())
	if !o.counts[len(counted)] {
		o.counts[len(counted)] = true
		text := fmt.Sprintf("%d replicas:", len(counted))
		for _, p := range counted {
			text += fmt.Sprintf(" %s (%s, clone of %q, deleted %v)", p.Name, p.Status.Phase, p.Spec.ClonePod, p.DeletionTimestamp)
		}
		o.story = append(o.story, text)
	}
	if p.Spec.ClonePod != "" && o.cloned != nil {
		close(o.cloned)
		o.cloned = nil
	}
}

// deploy makes the Deployment, gives each of its pods a number of its own, and watches.
func deploy(ctx context.Context, t *testing.T, k *kit.Kit) (o *observed, cloned <-chan struct{}, numbers map[int]time.Time) {
	t.Helper()
	apply(ctx, t, k, webDeployment)
	if _, err := k.Kubectl(ctx, "rollout", "status", "--timeout=30s", "deployment/web"); err != nil {
		t.Fatal(err)
	}
	ch := make(chan struct{})
	o = &observed{pods: map[string]*v1.Pod{}, counts: map[int]bool{}, statuses: map[int]bool{}, cloned: ch}
	numbers = map[int]time.Time{}
	list, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil || len(list.Items) != 3 {
		t.Fatalf("%d pods, %v", len(list.Items), err)
	}
	for i := range list.Items {
		p := &list.Items[i]
		o.pods[p.Name] = p
		for range i + 1 {
			next(ctx, t, p)
		}
		s := getJSON[counterState](ctx, t, p, 8080, "/status")
		numbers[int(s.Sequence)] = s.Started
	}
	t.Cleanup(follow(ctx, t, k, o.pod))
	w, err := k.Client.AppsV1().ReplicaSets(k.Namespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	ended.Go(func() {
		for e := range w.ResultChan() {
			if rs, ok := e.Object.(*appsv1.ReplicaSet); ok {
				o.mu.Lock()
				o.statuses[int(rs.Status.Replicas)] = true
				o.mu.Unlock()
			}
		}
	})
	t.Cleanup(func() { w.Stop(); ended.Wait() })
	return o, ch, numbers
}

// survivors are the numbers of the Deployment's pods, which started with one each.
func survivors(ctx context.Context, t *testing.T, k *kit.Kit, numbers map[int]time.Time) (left []int, nodes map[string]int) {
	t.Helper()
	nodes = map[string]int{}
	list, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range list.Items {
		p := &list.Items[i]
		if deferral.Ended(p) || p.DeletionTimestamp != nil {
			continue
		}
		body, err := ask(ctx, http.MethodGet, p, 8080, "/status")
		if err != nil {
			t.Fatal(err)
		}
		var s counterState
		if err := json.Unmarshal([]byte(body), &s); err != nil {
			t.Fatal(err)
		}
		if at, ok := numbers[int(s.Sequence)]; ok && !at.Equal(s.Started) {
			t.Errorf("pod %s has the number %d and was started at %s, not %s", p.Name, s.Sequence, s.Started, at)
		}
		left = append(left, int(s.Sequence))
		nodes[p.Spec.NodeName]++
	}
	slices.Sort(left)
	return left, nodes
}

// settled waits until the Deployment has so many pods, all of them ready, and no others.
func settled(ctx context.Context, t *testing.T, k *kit.Kit, replicas int) {
	t.Helper()
	until(ctx, t, fmt.Sprintf("there are %d pods", replicas), func() error {
		d, err := k.Client.AppsV1().Deployments(k.Namespace).Get(ctx, "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		list, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return err
		}
		s := d.Status
		if len(list.Items) != replicas || int(s.ReadyReplicas) != replicas || int(s.UpdatedReplicas) != replicas || int(s.Replicas) != replicas || s.ObservedGeneration != d.Generation {
			return fmt.Errorf("%d pods, status %+v", len(list.Items), s)
		}
		return nil
	})
}

// The pods of a Deployment move, and nobody makes or kills another one meanwhile.
func TestDeploymentKeepsItsPods(t *testing.T) {
	ctx, k := begin(t, 5*time.Minute)
	install(ctx, t)
	for _, tt := range []struct {
		name string
		// meanwhile is done as soon as there is a clone.
		meanwhile []string
		replicas  int
		// fresh is how many pods may be new, counts which numbers of replicas may be seen.
		fresh  int
		counts []int
		// kept is how many of the pods' numbers are left at least.
		kept int
	}{
		{"drain", nil, 3, 0, []int{3}, 3},
		{"drain and scale-down", []string{"scale", "deployment/web", "--replicas=2"}, 2, 0, []int{2, 3}, 2},
		// Three and one more for the rollout. A pod that the ReplicaSet deletes while it moves may have
		// been given away: then its clone is one too many until the ReplicaSet looks again.
		{"drain and rollout", []string{"set", "env", "deployment/web", "ROUND=2"}, 3, 3, []int{3, 4, 5}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, cloned, numbers := deploy(ctx, t, k)
			drained := make(chan error, 1)
			go func() { drained <- drain(ctx, t, k, node1) }()
			select {
			case <-cloned:
			case <-ctx.Done():
				t.Fatal("nothing moves")
			}
			if tt.meanwhile != nil {
				if _, err := k.Kubectl(ctx, tt.meanwhile...); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-drained; err != nil {
				t.Error(err)
			}
			settled(ctx, t, k, tt.replicas)
			left, nodes := survivors(ctx, t, k, numbers)
			if nodes[node1] != 0 {
				t.Errorf("%d pods are on the drained node", nodes[node1])
			}
			kept := 0
			for i, n := range left {
				if n > 0 && (i == 0 || left[i-1] != n) {
					kept++
				}
			}
			if kept < tt.kept {
				t.Errorf("of the pods' numbers only %v are left", left)
			}
			o.mu.Lock()
			if len(o.fresh) > tt.fresh {
				t.Errorf("new pods %v", o.fresh)
			}
			for n := range o.counts {
				if !slices.Contains(tt.counts, n) {
					t.Errorf("there were %d replicas", n)
				}
			}
			for n := range o.statuses {
				if tt.fresh == 0 && !slices.Contains(tt.counts, n) {
					t.Errorf("the ReplicaSet's status had %d replicas", n)
				}
			}
			t.Logf("replicas %v, in the status %v, new pods %v, numbers left %v\n%s", o.counts, o.statuses, o.fresh, left, strings.Join(o.story, "\n"))
			o.mu.Unlock()
			if _, err := k.Kubectl(ctx, "uncordon", node1); err != nil {
				t.Fatal(err)
			}
			if _, err := k.Kubectl(ctx, "delete", "--cascade=foreground", "--timeout=60s", "deployment/web"); err != nil {
				t.Fatal(err)
			}
			list, err := k.Client.CoreV1().Pods(k.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
			if err != nil || len(list.Items) != 0 {
				t.Errorf("%d pods are left of the Deployment, %v", len(list.Items), err)
			}
		})
	}
}
