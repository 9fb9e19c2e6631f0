//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/tools/clone"
)

const nginxPod = `
apiVersion: v1
kind: Pod
metadata: {name: nginx-0}
spec:
  nodeName: node1
  containers:
  - name: nginx
    image: podmig.dev/nginx:v1
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
`

// workers asks until each of nginx's two workers has answered.
func workers(ctx context.Context, t *testing.T, p *v1.Pod) map[string]bool {
	t.Helper()
	seen := make(map[string]bool)
	until(ctx, t, "both workers have answered", func() error {
		seen[get(ctx, t, p, 80, "/worker")] = true
		if len(seen) < 2 {
			return fmt.Errorf("one worker has answered: %v", seen)
		}
		return nil
	})
	return seen
}

// The processes of an nginx, a master and two workers that share sockets, stay the same.
func TestNginxMovesWithItsWorkers(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "nginx-0", nginxPod)
	page, before := get(ctx, t, p, 80, "/"), workers(ctx, t, p)
	for i, node := range []string{node2, node1} {
		p = move(ctx, t, k, p.Name, fmt.Sprintf("nginx-%d", i+1), node)
		if got := get(ctx, t, p, 80, "/"); got != page {
			t.Errorf("the page is %q, before it was %q", got, page)
		}
		for pid := range workers(ctx, t, p) {
			if !before[pid] {
				t.Errorf("process %s answers on %s, before there were %v", pid, node, before)
			}
		}
	}
	// The master still minds its children: a new configuration means new workers.
	if _, err := k.Exec(ctx, p.Name, "nginx", "-c", "/etc/nginx/podmig.conf", "-s", "reload"); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "new workers answer", func() error {
		if pid := get(ctx, t, p, 80, "/worker"); before[pid] {
			return fmt.Errorf("process %s still answers", pid)
		}
		return nil
	})
}

const postgresPod = `
apiVersion: v1
kind: Pod
metadata: {name: postgres-0}
spec:
  nodeName: node1
  containers:
  - name: postgres
    image: podmig.dev/postgres:v1
    imagePullPolicy: Never
    args: [-c, max_prepared_transactions=2]
    readinessProbe: {exec: {command: [psql, -h, /tmp, -U, postgres, -c, select 1]}, periodSeconds: 1, timeoutSeconds: 5}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: podmig.dev/postgres:v1
    imagePullPolicy: Never
    command: [sleep, infinity]
`

// postgres asks a database from a pod that does not move.
type postgres struct {
	k      *kit.Kit
	server *v1.Pod
}

func (d postgres) args(sql string) []string {
	return []string{"psql", "-h", d.server.Status.PodIP, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-qAtc", sql}
}

func (d postgres) query(ctx context.Context, t *testing.T, sql string) string {
	t.Helper()
	out, err := d.k.Exec(ctx, "client", d.args(sql)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// What a postgres holds in its shared memory is still there on the other node: pages
// that were never written to disk and a transaction that somebody else will commit.
// A transaction whose client was connected during the move is rolled back.
func TestPostgresMovesWithItsTransactions(t *testing.T) {
	ctx, k := begin(t, 4*time.Minute)
	d := postgres{k, start(ctx, t, k, "postgres-0", postgresPod)}
	if _, err := k.WaitRunning(ctx, "client"); err != nil {
		t.Fatal(err)
	}
	d.query(ctx, t, `create table lasting(n int primary key, s text); insert into lasting select n, md5(n::text) from generate_series(1, 20000) n`)
	// A crash of the server would empty this one.
	d.query(ctx, t, `create unlogged table fleeting as select n, md5(n::text) s from generate_series(1, 20000) n`)
	d.query(ctx, t, `create sequence counter`)
	d.query(ctx, t, `begin; insert into lasting values (30000, 'prepared'); prepare transaction 'later'`)
	const facts = `select pg_postmaster_start_time(), (select count(*) || md5(string_agg(s, '' order by n)) from lasting),
		(select count(*) || md5(string_agg(s, '' order by n)) from fleeting), (select string_agg(gid, ',') from pg_prepared_xacts)`
	before := d.query(ctx, t, facts)
	if n := d.query(ctx, t, `select nextval('counter')`); n != "1" {
		t.Fatalf("the sequence begins with %s", n)
	}

	// The shell of the exec ends at once, its child stays connected.
	open := d.args(`begin; insert into lasting values (40000, 'open'); select pg_sleep(600); commit`)
	quoted := make([]string, len(open))
	for i, a := range open {
		quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	if _, err := k.Exec(ctx, "client", "sh", "-c", strings.Join(quoted, " ")+" >/tmp/open 2>&1 </dev/null &"); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "the open transaction sleeps", func() error {
		if n := d.query(ctx, t, `select count(*) from pg_stat_activity where wait_event = 'PgSleep'`); n != "1" {
			return fmt.Errorf("%s sessions sleep", n)
		}
		return nil
	})

	d.server = move(ctx, t, k, "postgres-0", "postgres-1", node2)
	if after := d.query(ctx, t, facts); after != before {
		t.Errorf("before the move %s\nafter it %s", before, after)
	}
	// After a crash the sequence would go on behind the numbers it had reserved.
	if n := d.query(ctx, t, `select nextval('counter')`); n != "2" {
		t.Errorf("the sequence goes on with %s", n)
	}
	d.query(ctx, t, `commit prepared 'later'`)
	if s := d.query(ctx, t, `select s from lasting where n = 30000`); s != "prepared" {
		t.Errorf("the prepared transaction left %q", s)
	}
	until(ctx, t, "the transaction without a client is rolled back", func() error {
		if n := d.query(ctx, t, `select count(*) from pg_stat_activity where wait_event = 'PgSleep'`); n != "0" {
			// Its backend notices when it next uses the connection; a query that sleeps does not.
			d.query(ctx, t, `select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'PgSleep'`)
			return fmt.Errorf("%s sessions sleep", n)
		}
		return nil
	})
	if n := d.query(ctx, t, `select count(*) from lasting where n = 40000`); n != "0" {
		t.Error("a transaction was committed whose client was gone")
	}
	// And back, to see that the database is whole enough to move again.
	d.server = move(ctx, t, k, "postgres-1", "postgres-2", node1)
	if n := d.query(ctx, t, `insert into lasting values (50000, 'after'); select count(*) from lasting`); n != "20002" {
		t.Errorf("after two moves the table has %s rows", n)
	}
	d.query(ctx, t, `checkpoint`)
}

const pythonPod = `
apiVersion: v1
kind: Pod
metadata: {name: python-0}
spec:
  nodeName: node1
  containers:
  - name: python
    image: podmig.dev/python:v1
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
`

type pythonState struct {
	PID      int
	Started  float64
	Threads  []int
	Gaps     int
	Children []struct {
		PID, Last int
		Exit      *int
	}
}

// advanced tells whether every thread and child has counted on since before.
func (s pythonState) advanced(before pythonState) error {
	for i, n := range before.Threads {
		if s.Threads[i] <= n {
			return fmt.Errorf("thread %d has counted to %d, before to %d", i, s.Threads[i], n)
		}
	}
	for i, c := range before.Children {
		if s.Children[i].Last <= c.Last {
			return fmt.Errorf("child %d has counted to %d, before to %d", i, s.Children[i].Last, c.Last)
		}
	}
	return nil
}

// Threads go on counting in memory, subprocesses through pipes, without a gap.
func TestPythonMovesWithThreadsAndSubprocesses(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "python-0", pythonPod)
	before := getJSON[pythonState](ctx, t, p, 8080, "/")
	if len(before.Threads) < 2 || len(before.Children) < 2 {
		t.Fatalf("the program has %d threads and %d children", len(before.Threads), len(before.Children))
	}
	for i, node := range []string{node2, node1} {
		p = move(ctx, t, k, p.Name, fmt.Sprintf("python-%d", i+1), node)
		var after pythonState
		until(ctx, t, "everything counts on", func() error {
			after = getJSON[pythonState](ctx, t, p, 8080, "/")
			return after.advanced(before)
		})
		if after.PID != before.PID || after.Started != before.Started {
			t.Errorf("process %d started at %f, before process %d at %f", after.PID, after.Started, before.PID, before.Started)
		}
		if after.Gaps != 0 {
			t.Errorf("%d numbers of the children were lost or repeated", after.Gaps)
		}
		for j, c := range after.Children {
			if c.PID != before.Children[j].PID || c.Exit != nil {
				t.Errorf("child %d is process %d (exit %v), before %d", j, c.PID, c.Exit, before.Children[j].PID)
			}
		}
		before = after
	}
}

// counterPod has a Go HTTP server.
func counterPod(env string) string {
	return `
apiVersion: v1
kind: Pod
metadata: {name: counter-0}
spec:
  nodeName: node1
  containers:
  - name: counter
    image: podmig.dev/counter:v1
    imagePullPolicy: Never
    env: [` + env + `]
    readinessProbe: {httpGet: {path: /status, port: 8080}, periodSeconds: 1}
`
}

type counterState struct {
	PID      int
	Started  time.Time
	Ticks    uint64
	Sequence uint64
}

func next(ctx context.Context, t *testing.T, p *v1.Pod) int {
	t.Helper()
	s, err := ask(ctx, http.MethodPost, p, 8080, "/next")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A Go server whose listeners speak plain TCP moves with what it has in memory.
func TestGoServerMoves(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "counter-0", counterPod(""))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	for i, node := range []string{node2, node1} {
		if n := next(ctx, t, p); n != 2*i+1 {
			t.Fatalf("number %d comes before move %d", n, i+1)
		}
		p = move(ctx, t, k, p.Name, fmt.Sprintf("counter-%d", i+1), node)
		if n := next(ctx, t, p); n != 2*i+2 {
			t.Fatalf("number %d comes after move %d", n, i+1)
		}
		after := getJSON[counterState](ctx, t, p, 8080, "/status")
		if after.PID != before.PID || !after.Started.Equal(before.Started) || after.Ticks < before.Ticks {
			t.Errorf("before %+v, after %+v", before, after)
		}
		before = after
		// Nothing of the clone is said to have started before it was restored.
		events := k.Events(ctx, p.Name)
		restoring := slices.IndexFunc(events, func(e v1.Event) bool { return e.Reason == v1alpha1.ReasonRestoring })
		started := slices.IndexFunc(events, func(e v1.Event) bool { return e.Reason == "Started" })
		if restoring < 0 || started < restoring {
			t.Errorf("move %d: of the events Restoring is number %d and Started number %d", i+1, restoring, started)
		}
	}
}

// Go's own choice for listeners is multipath TCP, which CRIU cannot dump. The pod is
// told so before anything was done to it.
func TestGoServerWithMultipathTCPIsRefused(t *testing.T) {
	ctx, k := begin(t, 2*time.Minute)
	p := start(ctx, t, k, "counter-0", counterPod(`{name: GODEBUG, value: "multipathtcp=2"}`))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	_, err := k.Move(ctx, p.Name, clone.Options{Name: "counter-1", Node: node2})
	if !errors.Is(err, kit.ErrNotCloned) {
		t.Fatalf("the move ended with %v", err)
	}
	for _, words := range []string{"multipath TCP", "GODEBUG=multipathtcp=0"} {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("%q is not in: %v", words, err)
		}
	}
	after := getJSON[counterState](ctx, t, p, 8080, "/status")
	if after.PID != before.PID || !after.Started.Equal(before.Started) {
		t.Errorf("before %+v, after %+v", before, after)
	}
}
