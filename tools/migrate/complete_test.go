package migrate

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podmig.dev/podmig/tools/completion"
)

// The words are those that kubectl gives to the program that completes.
func TestComplete(t *testing.T) {
	inOther := pod("other")
	inOther.Namespace = "other"
	c := newClient(t, pod("redis"), pod("nginx", of("apps/v1", "ReplicaSet")), pod("db", of("apps/v1", "StatefulSet")), pod("new", phase(corev1.PodPending)), inOther,
		node1(false), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node2"}}, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	config := twoContexts(t, "http://one.invalid", "http://two.invalid")
	for _, tt := range []struct{ args, want string }{
		{" ", "nginx redis :4"},
		{"-n other ", "other :4"},
		{"--context two ", ":4"},
		{"redis ", "node2 :4"},
		{"gone ", "node1 node2 :4"},
		{"redis node2 ", ":4"},
		{"--from ", "node1 node2 :4"},
		{"--from node1 ", ":4"},
		{"--from node1 --to ", "node2 :4"},
		{"--from=", "node1 node2 :4"},
		{"redis --to ", "node1 node2 :4"},
		{"redis -n ", "shop :4"},
		{"redis --namespace ", "shop :4"},
		{"redis --context ", "one two :4"},
		{"redis -o ", "name json yaml wide :4"},
		{"redis --node-selector ", ":4"},
	} {
		var out, errOut bytes.Buffer
		o := &options{config: genericclioptions.NewConfigFlags(true), out: &out, errOut: &errOut, connect: func() (client.WithWatch, error) { return c, nil }}
		if err := completion.Run(o.command(), &out, &errOut, append([]string{"--kubeconfig", config}, strings.Split(strings.TrimPrefix(tt.args, " "), " ")...)); err != nil {
			t.Errorf("%q: %v", tt.args, err)
		}
		if got := strings.Join(strings.Fields(out.String()), " "); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.args, got, tt.want)
		}
	}
}

// A shell gets no words, and no files either, from a cluster that does not answer.
func TestCompleteFails(t *testing.T) {
	var out, errOut bytes.Buffer
	o := &options{config: genericclioptions.NewConfigFlags(true), out: &out, errOut: &errOut, connect: func() (client.WithWatch, error) { return nil, errors.New("no cluster") }}
	if err := completion.Run(o.command(), &out, &errOut, []string{"--from", ""}); err != nil || strings.TrimSpace(out.String()) != ":1" {
		t.Errorf("%q, %v", &out, err)
	}
}
