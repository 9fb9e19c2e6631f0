//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"podmig.dev/podmig/cluster-setup/kit"
	"podmig.dev/podmig/cluster-setup/pki"
	cri "podmig.dev/podmig/cri-api/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
	"podmig.dev/podmig/tools/clone"
)

// issue makes a client certificate that the cluster's authority has signed.
func issue(t *testing.T, user string, groups ...string) *tls.Config {
	t.Helper()
	pair, err := authority(t).Issue(pki.Request{CommonName: user, Groups: groups, Client: true})
	if err != nil {
		t.Fatal(err)
	}
	return clientTLS(t, pair.Cert, pair.Key)
}

// authority is the cluster's own.
func authority(t *testing.T) *pki.CA {
	t.Helper()
	var pair pki.Pair
	var err error
	dir := filepath.Join(admin.Cluster.Dir(), "pki")
	if pair.Cert, err = os.ReadFile(filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	if pair.Key, err = os.ReadFile(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	ca, err := pki.LoadCA(pair)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// clientTLS trusts the cluster's authority and shows a certificate, if one is given.
func clientTLS(t *testing.T, cert, key []byte) *tls.Config {
	t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool()}
	c.RootCAs.AppendCertsFromPEM(authority(t).Cert)
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

// stolen is the very certificate with which the kubelet of a node works.
func stolen(t *testing.T, node string) *tls.Config {
	t.Helper()
	m, err := admin.Cluster.Machine(node)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", filepath.Join(m.Upper(), "etc/kubernetes/kubelet.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if err := rest.LoadTLSFiles(cfg); err != nil {
		t.Fatal(err)
	}
	return clientTLS(t, cfg.CertData, cfg.KeyData)
}

// kubeletAddress is where the kubelet of a node serves.
func kubeletAddress(ctx context.Context, t *testing.T, node string) string {
	t.Helper()
	n, err := admin.Client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(n.Status.Addresses, func(a v1.NodeAddress) bool { return a.Type == v1.NodeInternalIP })
	return net.JoinHostPort(n.Status.Addresses[i].Address, fmt.Sprint(n.Status.DaemonEndpoints.KubeletEndpoint.Port))
}

func hubDial(ctx context.Context, network, address string) (net.Conn, error) {
	return admin.Cluster.Hub().Dial(ctx, network, address)
}

// asPeer asks the kubelet of a node with somebody's certificate, as kubelets do.
func asPeer(ctx context.Context, t *testing.T, node string, identity *tls.Config) *peer.Client {
	t.Helper()
	c, err := peer.NewClient(peer.ClientConfig{Address: kubeletAddress(ctx, t, node), Node: node, TLS: identity, Dial: hubDial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// verbs are all requests of a session but open.
func verbs(c *peer.Client, s wire.Session) map[wire.Verb]func(context.Context) error {
	failure := &wire.FailureRequest{Reason: "Attack", Message: "an attack"}
	return map[wire.Verb]func(context.Context) error{
		wire.VerbStatus: func(ctx context.Context) error { _, err := c.Status(ctx, s); return err },
		wire.VerbStream: func(ctx context.Context) error {
			r, err := c.Stream(ctx, s)
			if err == nil {
				r.Close()
			}
			return err
		},
		wire.VerbFreeze: func(ctx context.Context) error { _, err := c.Freeze(ctx, s, &wire.FreezeRequest{}); return err },
		wire.VerbCommit: func(ctx context.Context) error { _, err := c.Commit(ctx, s, &wire.CommitRequest{}); return err },
		wire.VerbDone:   func(ctx context.Context) error { return c.Done(ctx, s, &wire.DoneRequest{}) },
		wire.VerbFailed: func(ctx context.Context) error { return c.Failed(ctx, s, failure) },
		wire.VerbAbort:  func(ctx context.Context) error { return c.Abort(ctx, s, failure) },
	}
}

// openRequest is what a target that could take the pod would send.
func openRequest(p *v1.Pod, node string) *wire.OpenRequest {
	r := &wire.OpenRequest{
		Clone: p.Name + "-clone", SourceUID: string(p.UID), TargetNode: node,
		Features: wire.Features{StreamVersions: []uint32{cri.StreamVersion}, Architecture: runtime.GOARCH, CPUFeatures: cpuFlags()},
	}
	for _, c := range p.Spec.Containers {
		r.Containers = append(r.Containers, wire.TargetContainer{Name: c.Name, Image: c.Image})
	}
	return r
}

// cpuFlags are those of this machine, on which all nodes run.
func cpuFlags() []string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.SplitSeq(string(b), "\n") {
		if key, flags, ok := strings.Cut(line, ":"); ok && (strings.HasPrefix(key, "flags") || strings.HasPrefix(key, "Features")) {
			return strings.Fields(flags)
		}
	}
	return nil
}

// logged counts the lines in a kubelet's log that have all the words.
func logged(t *testing.T, node string, words ...string) int {
	t.Helper()
	m, err := admin.Cluster.Machine(node)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(m.Logs(), "kubelet.log"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.SplitSeq(string(b), "\n") {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n
}

// refusedOnce sends a request three times: each is refused with the code, and the
// kubelet's log has one line about it.
func refusedOnce(ctx context.Context, t *testing.T, caller string, s wire.Session, v wire.Verb, code wire.Code, ask func(context.Context) error) {
	t.Helper()
	for range 3 {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		if err := ask(ctx); wire.CodeOf(err) != code {
			t.Errorf("%s by %s: %v, not %s", v, caller, err, code)
		}
		cancel()
	}
	words := []string{"Refused migration request", s.ID, fmt.Sprintf("caller=%q", caller), fmt.Sprintf("verb=%q", v), fmt.Sprintf("code=%q", code)}
	until(ctx, t, "the kubelet has logged it", func() error {
		if logged(t, node1, words...) == 0 {
			return fmt.Errorf("no line with %q", words)
		}
		return nil
	})
	if n := logged(t, node1, words...); n != 1 {
		t.Errorf("%s by %s: the kubelet has logged %d lines", v, caller, n)
	}
}

// undisturbed checks that a source runs as it did: the same process, never stopped,
// and nothing was said about it.
func undisturbed(ctx context.Context, t *testing.T, k *kit.Kit, p *v1.Pod, before counterState) {
	t.Helper()
	now, err := k.Pod(ctx, p.Name)
	if err != nil {
		t.Fatal(err)
	}
	if now.Status.Phase != v1.PodRunning || now.Status.ContainerStatuses[0].RestartCount != 0 || !now.Status.ContainerStatuses[0].Ready {
		t.Errorf("the source is %s: %s", now.Status.Phase, now.Status.ContainerStatuses[0].String())
	}
	if after := getJSON[counterState](ctx, t, p, 8080, "/status"); after.PID != before.PID || !after.Started.Equal(before.Started) {
		t.Errorf("the source is process %d started at %s, before it was %d at %s", after.PID, after.Started, before.PID, before.Started)
	}
	for _, e := range k.Events(ctx, p.Name) {
		if strings.HasPrefix(e.Reason, "Migration") {
			t.Errorf("the source was touched: %s: %s", e.Reason, e.Message)
		}
	}
}

// Whoever is not the node of a clone gets nothing of a session, not even a hint.
// node3 is a node of which the test has the certificate: it begins a migration the
// way a kubelet would, and others try to have it.
func TestSessionsBelongToTheNodeOfTheClone(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "counter-0", counterPod(""))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	const node3 = "node3"
	legit, thief := asPeer(ctx, t, node1, issue(t, "system:node:"+node3, "system:nodes")), asPeer(ctx, t, node1, stolen(t, node2))

	// Guessed: there is no such clone.
	guess := wire.Session{Namespace: k.Namespace, Pod: p.Name, ID: string(uuid.NewUUID())}
	refusedOnce(ctx, t, "system:node:node2", guess, wire.VerbOpen, wire.CodeForbidden, func(ctx context.Context) error {
		_, err := thief.Open(ctx, guess, openRequest(p, node2))
		return err
	})
	for v, ask := range verbs(thief, guess) {
		refusedOnce(ctx, t, "system:node:node2", guess, v, wire.CodeUnknownSession, ask)
	}
	undisturbed(ctx, t, k, p, before)

	// A clone for node3, which node2 wants to have.
	nodeThatMoves(ctx, t, k, node3)
	o := clone.Options{Name: p.Name + "-clone", Node: node3}
	if err := k.Clone(ctx, p.Name, o, bindTo(node3)); err != nil {
		t.Fatal(err)
	}
	c, err := k.Pod(ctx, o.Name)
	if err != nil {
		t.Fatal(err)
	}
	s := wire.Session{Namespace: k.Namespace, Pod: p.Name, ID: string(c.UID)}
	open := func(c *peer.Client, node string) func(context.Context) error {
		return func(ctx context.Context) error { _, err := c.Open(ctx, s, openRequest(p, node)); return err }
	}
	refusedOnce(ctx, t, "system:node:node2", s, wire.VerbOpen, wire.CodeForbidden, open(thief, node2))
	undisturbed(ctx, t, k, p, before)
	// The API server's authorizer learns of the clone a moment later.
	until(ctx, t, "node3 may open the session", func() error { return open(legit, node3)(ctx) })
	for v, ask := range verbs(thief, s) {
		refusedOnce(ctx, t, "system:node:node2", s, v, wire.CodeForbidden, ask)
	}
	// In the name of the rightful node, but without its certificate.
	if err := open(thief, node3)(ctx); wire.CodeOf(err) != wire.CodeForbidden {
		t.Errorf("open in the name of another node: %v", err)
	}
	// Nor may the rightful node use its session for another pod.
	other := wire.Session{Namespace: k.Namespace, Pod: "other", ID: s.ID}
	if _, err := legit.Freeze(ctx, other, &wire.FreezeRequest{}); wire.CodeOf(err) != wire.CodeForbidden {
		t.Errorf("freeze of another pod: %v", err)
	}
	undisturbed(ctx, t, k, p, before)

	// The rightful node gives up; what it says again later has no effect any more.
	if err := legit.Abort(ctx, s, &wire.FailureRequest{Reason: "Cancelled", Message: "the test has seen enough"}); err != nil {
		t.Fatal(err)
	}
	again := verbs(legit, s)
	for _, v := range []wire.Verb{wire.VerbStream, wire.VerbFreeze, wire.VerbCommit} {
		refusedOnce(ctx, t, "system:node:"+node3, s, v, wire.CodeAborted, again[v])
	}
	// No kubelet will say that it is gone.
	if _, err := k.Kubectl(ctx, "delete", "pod", c.Name, "--grace-period=0", "--force"); err != nil {
		t.Fatal(err)
	}

	// After a migration that ended well its own target has no second try.
	moved := move(ctx, t, k, p.Name, "counter-1", node2)
	s.ID = string(moved.UID)
	again = verbs(thief, s)
	for _, v := range []wire.Verb{wire.VerbStream, wire.VerbFreeze, wire.VerbFailed, wire.VerbAbort} {
		refusedOnce(ctx, t, "system:node:node2", s, v, wire.CodeReleased, again[v])
	}
	for v, ask := range verbs(legit, s) {
		refusedOnce(ctx, t, "system:node:"+node3, s, v, wire.CodeForbidden, ask)
	}
	if after := getJSON[counterState](ctx, t, moved, 8080, "/status"); after.PID != before.PID || !after.Started.Equal(before.Started) {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// nodeThatMoves makes a node without a kubelet, which declares that it can move pods,
// until the test ends.
func nodeThatMoves(ctx context.Context, t *testing.T, k *kit.Kit, name string) {
	t.Helper()
	nodes := k.Client.CoreV1().Nodes()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := nodes.Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	if _, err := nodes.Create(ctx, &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	setNodeStatus(ctx, t, k, name, `{"declaredFeatures": ["PodMigration"]}`)
}

// setNodeStatus changes a part of a node's status.
func setNodeStatus(ctx context.Context, t *testing.T, k *kit.Kit, name, part string) {
	t.Helper()
	if _, err := k.Client.CoreV1().Nodes().PatchStatus(ctx, name, []byte(`{"status": `+part+`}`)); err != nil {
		t.Fatal(err)
	}
}

// bindTo puts a clone on a node without asking the scheduler.
func bindTo(node string) func(*unstructured.Unstructured) {
	return func(u *unstructured.Unstructured) {
		_ = unstructured.SetNestedField(u.Object, node, "spec", "nodeName")
	}
}

// Users, however many rights on nodes they have, and strangers have no business at a
// kubelet's migration endpoint.
func TestOnlyNodesMayAskForPods(t *testing.T) {
	ctx, k := begin(t, 2*time.Minute)
	p := start(ctx, t, k, "counter-0", counterPod(""))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	grant(ctx, t, k, "proxy", "peter", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/proxy", "nodes/metrics", "nodes/stats", "nodes/log"}, Verbs: []string{"*"}})
	grant(ctx, t, k, "migration", "mary", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/migration"}, Verbs: []string{"*"}})
	address := kubeletAddress(ctx, t, node1)
	s := wire.Session{Namespace: k.Namespace, Pod: p.Name, ID: string(uuid.NewUUID())}
	body, err := wire.Encode(openRequest(p, node2))
	if err != nil {
		t.Fatal(err)
	}
	send := func(scheme string, identity *tls.Config, method, path string) (int, string) {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: identity, DialContext: hubDial, DisableKeepAlives: true}}
		r, err := http.NewRequestWithContext(ctx, method, scheme+"://"+address+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if method == http.MethodGet {
			r.Body, r.ContentLength = nil, 0
		}
		r.Header.Set("Content-Type", wire.ContentJSON)
		// Nobody speaks for somebody else at a kubelet.
		r.Header.Set("Impersonate-User", "system:node:node2")
		r.Header.Set("Impersonate-Group", "system:nodes")
		resp, err := client.Do(r)
		var b []byte
		if err == nil {
			b, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		switch {
		case scheme == "http" && errors.Is(err, syscall.ECONNRESET):
			// The kubelet hangs up on what is not TLS; its last words may be lost.
			return http.StatusBadRequest, "HTTPS"
		case err != nil:
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	peter, mary := issue(t, "peter"), issue(t, "mary")
	// He really has what he was given.
	until(ctx, t, "peter may list the pods of the node", func() error {
		if code, b := send("https", peter, http.MethodGet, "/pods"); code != http.StatusOK {
			return fmt.Errorf("status %d: %s", code, b)
		}
		return nil
	})
	for _, tc := range []struct {
		name, scheme string
		identity     *tls.Config
		status       int
		says         string
	}{
		{"plain HTTP", "http", nil, http.StatusBadRequest, "HTTPS"},
		{"no certificate", "https", clientTLS(t, nil, nil), http.StatusUnauthorized, "Unauthorized"},
		{"nodes/proxy", "https", peter, http.StatusForbidden, "Forbidden"},
		{"no rights", "https", issue(t, "nobody"), http.StatusForbidden, "Forbidden"},
		{"a name like a node's", "https", issue(t, "system:node:node2"), http.StatusForbidden, "Forbidden"},
		{"nodes/migration, but no node", "https", mary, http.StatusForbidden, "is not a node"},
	} {
		for _, v := range wire.Verbs() {
			if code, b := send(tc.scheme, tc.identity, v.Method(), s.Path(v)); code != tc.status || !strings.Contains(b, tc.says) {
				// Her right may take a moment to be known.
				if tc.identity == mary && strings.Contains(b, "Forbidden") {
					until(ctx, t, "mary has her right", func() error {
						if code, b = send(tc.scheme, tc.identity, v.Method(), s.Path(v)); !strings.Contains(b, tc.says) {
							return fmt.Errorf("status %d: %s", code, b)
						}
						return nil
					})
					continue
				}
				t.Errorf("%s, %s: status %d: %s", tc.name, v, code, b)
			}
		}
	}
	// The kubelet has refused these itself, each with one line for all that was asked.
	for _, words := range [][]string{
		{`caller=""`, `code="unknown-caller"`}, {`caller="peter"`, `code="forbidden"`}, {`caller="nobody"`, `code="forbidden"`},
	} {
		words = append(words, "Refused migration request", "remote=")
		if n := logged(t, node1, words...); n != 1 {
			t.Errorf("the kubelet has logged %d lines with %q", n, words)
		}
	}
	undisturbed(ctx, t, k, p, before)
}

// grant gives a user a right on the whole cluster until the test ends.
func grant(ctx context.Context, t *testing.T, k *kit.Kit, name, user string, rule rbacv1.PolicyRule) {
	t.Helper()
	meta := metav1.ObjectMeta{Name: k.Namespace + "-" + name}
	roles, bindings := k.Client.RbacV1().ClusterRoles(), k.Client.RbacV1().ClusterRoleBindings()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for _, err := range []error{bindings.Delete(ctx, meta.Name, metav1.DeleteOptions{}), roles.Delete(ctx, meta.Name, metav1.DeleteOptions{})} {
			if err != nil && !apierrors.IsNotFound(err) {
				t.Error(err)
			}
		}
	})
	if _, err := roles.Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{rule}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := bindings.Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// grantIn gives a user rights in the namespace of the test.
func grantIn(ctx context.Context, t *testing.T, k *kit.Kit, user string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	meta := metav1.ObjectMeta{Name: user + "-" + strings.ToLower(rand.Text()[:5])}
	if _, err := k.Client.RbacV1().Roles(k.Namespace).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: rules}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Client.RbacV1().RoleBindings(k.Namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// The right to create pods, and to do anything else with them, is not the right to
// take over one: that is a verb of its own, on the very pod.
func TestCloningIsARightOfItsOwn(t *testing.T) {
	ctx, k := begin(t, 3*time.Minute)
	p := start(ctx, t, k, "counter-0", counterPod(""))
	mine := start(ctx, t, k, "counter-1", strings.Replace(counterPod(""), "counter-0", "counter-1", 1))
	before := getJSON[counterState](ctx, t, p, 8080, "/status")
	user := "mallory"
	pods := func(verb string, names ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods", "pods/exec", "pods/ephemeralcontainers"}, Verbs: []string{verb}, ResourceNames: names}
	}
	grantIn(ctx, t, k, user, pods("create"), pods("get"), pods("list"), pods("watch"), pods("patch"), pods("update"), pods("delete"))
	mallory, err := k.As(user)
	if err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "mallory may create pods", func() error {
		err := mallory.Create(ctx, strings.Replace(counterPod(""), "counter-0", "counter-2", 1))
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return err
	})
	try := func(source, name string) error {
		return mallory.Clone(ctx, source, clone.Options{Name: name, Node: node2})
	}
	denied(t, try(p.Name, "stolen"), user, "may not clone", p.Name, `verb "clone"`)

	// The right on one pod is none on another.
	grantIn(ctx, t, k, user, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"clone"}, ResourceNames: []string{mine.Name}})
	until(ctx, t, "mallory may clone a pod", func() error { return try(mine.Name, "own") })
	denied(t, try(p.Name, "stolen"), user, "may not clone", p.Name)
	if _, err := k.WaitCloned(ctx, "own"); err != nil {
		t.Fatal(err)
	}

	// Nor does the right on a pod reach into another namespace: the name is looked up
	// where the clone is.
	other, err := k.In(ctx, k.Namespace+"-b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := k.Client.CoreV1().Namespaces().Delete(ctx, other.Namespace, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	inOther := func(u *unstructured.Unstructured) { u.SetNamespace(other.Namespace) }
	grantIn(ctx, t, other, user, pods("create"), pods("get"), pods("clone"))
	inSecond := func(name string) error {
		u, err := k.Dynamic.Resource(v1.SchemeGroupVersion.WithResource("pods")).Namespace(k.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		c, err := clone.Of(u, clone.Options{Name: "stolen", Node: node2})
		if err != nil {
			return err
		}
		inOther(c)
		_ = unstructured.SetNestedField(c.Object, name, "spec", "clonePod")
		_, err = mallory.Dynamic.Resource(v1.SchemeGroupVersion.WithResource("pods")).Namespace(other.Namespace).Create(ctx, c, metav1.CreateOptions{})
		return err
	}
	until(ctx, t, "mallory has the rights in the other namespace", func() error {
		if err := inSecond(p.Name); err == nil || strings.Contains(err.Error(), "may not clone") || strings.Contains(err.Error(), "cannot create") {
			return fmt.Errorf("the attempt ended with %v", err)
		}
		return nil
	})
	denied(t, inSecond(p.Name), "there is no pod", other.Namespace)
	if err := inSecond(k.Namespace + "/" + p.Name); !apierrors.IsInvalid(err) {
		t.Errorf("a name with a namespace: %v", err)
	}
	undisturbed(ctx, t, k, p, before)
	// And for whoever may, it can still be moved.
	move(ctx, t, k, p.Name, "counter-9", node2)
}
