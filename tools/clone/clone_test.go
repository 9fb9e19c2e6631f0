package clone

import (
	"reflect"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

func parse(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		t.Fatal(err)
	}
	return u
}

const running = `
apiVersion: v1
kind: Pod
metadata:
  name: redis
  namespace: games
  uid: 1f1f1f1f-0000-0000-0000-000000000000
  resourceVersion: "7"
  labels: {app: redis}
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: "{}"
    team: blue
spec:
  nodeName: node-1
  priority: 0
  fieldOfTheFuture: 7
  containers:
  - name: redis
    image: redis:7
    volumeMounts:
    - {name: data, mountPath: /data}
    - {name: kube-api-access-x1, mountPath: /var/run/secrets/kubernetes.io/serviceaccount}
  volumes:
  - {name: data, emptyDir: {}}
  - {name: kube-api-access-x1, projected: {}}
status: {phase: Running}
`

func TestOf(t *testing.T) {
	tests := []struct {
		name    string
		source  string
		options Options
		want    string
		err     string
	}{
		{
			name: "anywhere else", source: running, options: Options{Name: "redis-1"},
			want: `
apiVersion: v1
kind: Pod
metadata:
  name: redis-1
  namespace: games
  labels: {app: redis}
  annotations: {team: blue}
spec:
  clonePod: redis
  fieldOfTheFuture: 7
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
        - matchFields: [{key: metadata.name, operator: NotIn, values: [node-1]}]
  containers:
  - name: redis
    image: redis:7
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
`,
		},
		{
			name: "clone of a clone, to a node", options: Options{Name: "b", Node: "node-3"},
			source: `
kind: Pod
metadata: {name: a}
spec:
  nodeName: node-2
  clonePod: before
  containers: [{name: c}]
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
        - matchExpressions: [{key: disk, operator: In, values: [ssd]}]
          matchFields: [{key: metadata.name, operator: NotIn, values: [node-1]}]
`,
			want: `
apiVersion: v1
kind: Pod
metadata: {name: b}
spec:
  clonePod: a
  containers: [{name: c}]
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
        - matchExpressions: [{key: disk, operator: In, values: [ssd]}]
          matchFields: [{key: metadata.name, operator: In, values: [node-3]}]
`,
		},
		{name: "same name", source: running, options: Options{Name: "redis"}, err: "name of its own"},
		{name: "same node", source: running, options: Options{Name: "x", Node: "node-1"}, err: "already"},
		{name: "pending", source: "kind: Pod\nmetadata: {name: p}\nspec: {}", options: Options{Name: "x"}, err: "on no node yet"},
		{name: "not a pod", source: "kind: Job", options: Options{Name: "x"}, err: "only pods"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			source := parse(t, tt.source)
			before := source.DeepCopy()
			got, err := Of(source, tt.options)
			if !reflect.DeepEqual(source.Object, before.Object) {
				t.Error("the source was changed")
			}
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("got error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := parse(t, tt.want); !reflect.DeepEqual(got.Object, want.Object) {
				g, _ := yaml.Marshal(got.Object)
				w, _ := yaml.Marshal(want.Object)
				t.Errorf("got\n%s\nwant\n%s", g, w)
			}
		})
	}
}
