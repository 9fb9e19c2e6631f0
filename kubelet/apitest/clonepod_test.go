//go:build podmig_patched

package apitest

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
)

const namespace = "shop"

type tweak func(*corev1.Pod)

func newPod(name, node string, tweaks ...tweak) *corev1.Pod {
	noGrace := int64(0)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			NodeName:                      node,
			TerminationGracePeriodSeconds: &noGrace,
			Containers:                    []corev1.Container{{Name: "app", Image: "example.org/app:1"}},
		},
	}
	for _, tweak := range tweaks {
		tweak(pod)
	}
	return pod
}

func cloning(source string) tweak {
	return func(pod *corev1.Pod) { pod.Spec.ClonePod = source }
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// prepare makes what the tests share: a namespace, nodes that can move pods (n1 and n2 are those of pods that nobody
// asks for) and one whose kubelet is of another time, and alice, who may do with pods and deployments what the role
// "edit" allows.
func prepare(ctx context.Context, t *testing.T, plane *controlPlane, admin kubernetes.Interface) {
	t.Helper()
	must[*corev1.Namespace](t)(admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}))
	for _, name := range []string{"default", "other"} {
		must[*corev1.ServiceAccount](t)(admin.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))
	}
	for _, name := range []string{"a", "b", "c", "n1", "n2", "old"} {
		must[*corev1.Node](t)(admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))
		if name == "old" {
			continue
		}
		kubelet := "system:node:" + name
		if len(name) > 1 {
			// Nobody asks for it.
			kubelet = "admin"
		}
		must[*corev1.Node](t)(plane.client(t, kubelet).CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType,
			[]byte(`{"status":{"declaredFeatures":["PodMigration"]}}`), metav1.PatchOptions{}, "status"))
	}
	// No controller aggregates roles here, so this names what "edit" has for pods and more.
	rules := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "pods/exec", "pods/attach"}, Verbs: []string{"create", "get", "list", "watch", "update", "patch", "delete", "deletecollection"}},
		{APIGroups: []string{"apps"}, Resources: []string{"deployments"}, Verbs: []string{"create"}},
	}
	must[*rbacv1.Role](t)(admin.RbacV1().Roles(namespace).Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "edit"}, Rules: rules}, metav1.CreateOptions{}))
	bind(ctx, t, admin, "edit")
}

func bind(ctx context.Context, t *testing.T, admin kubernetes.Interface, role string) {
	t.Helper()
	must[*rbacv1.RoleBinding](t)(admin.RbacV1().RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: "alice"}},
	}, metav1.CreateOptions{}))
}

// eventually waits for what an API server learns through its own watches: new roles and new pods.
func eventually(ctx context.Context, t *testing.T, what string, ok func() error) {
	t.Helper()
	var last error
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := wait.PollUntilContextCancel(ctx, 50*time.Millisecond, true, func(context.Context) (bool, error) {
		last = ok()
		return last == nil, nil
	}); err != nil {
		t.Errorf("%s: %v", what, last)
	}
}

func setPhase(ctx context.Context, t *testing.T, admin kubernetes.Interface, pod string, phase corev1.PodPhase) {
	t.Helper()
	patch := fmt.Sprintf(`{"status":{"phase":%q}}`, phase)
	must[*corev1.Pod](t)(admin.CoreV1().Pods(namespace).Patch(ctx, pod, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, "status"))
}

// TestClonePod walks through the life of clones on one API server, then restarts it with the gate off.
func TestClonePod(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	plane := newControlPlane(t)
	plane.serve(t, "--feature-gates=PodMigration=true")
	admin := plane.client(t, "admin")
	prepare(ctx, t, plane, admin)
	pods := admin.CoreV1().Pods(namespace)
	must[*corev1.Pod](t)(pods.Create(ctx, newPod("web", "n1"), metav1.CreateOptions{}))
	setPhase(ctx, t, admin, "web", corev1.PodRunning)

	t.Run("explain", func(t *testing.T) {
		out, err := plane.kubectl(t, "admin", "", "explain", "pod.spec.clonePod")
		text := strings.Join(strings.Fields(out), " ")
		if err != nil || !strings.Contains(text, "FIELD: clonePod <string>") || !strings.Contains(text, `verb "clone"`) ||
			!strings.Contains(text, "This is an alpha field and requires enabling the PodMigration feature gate") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("who may clone", func(t *testing.T) { testWhoMayClone(ctx, t, plane, admin) })
	t.Run("what may be cloned", func(t *testing.T) { testWhatMayBeCloned(ctx, t, plane) })
	t.Run("where clones may run", func(t *testing.T) { testWhereClonesMayRun(ctx, t, plane) })
	t.Run("old clients", func(t *testing.T) { testOldClients(ctx, t, plane) })
	t.Run("nodes", func(t *testing.T) { testNodes(ctx, t, plane, admin) })

	t.Run("gate off", func(t *testing.T) {
		must[*corev1.Pod](t)(pods.Create(ctx, newPod("kept", "b", cloning("web")), metav1.CreateOptions{}))
		readSource := func() error {
			_, err := plane.client(t, "system:node:b").CoreV1().Pods(namespace).Get(ctx, "web", metav1.GetOptions{})
			return err
		}
		eventually(ctx, t, "node b reads the source", readSource)

		plane.serve(t)
		admin := plane.client(t, "admin")
		pods := admin.CoreV1().Pods(namespace)
		if got := must[*corev1.Pod](t)(pods.Get(ctx, "kept", metav1.GetOptions{})); got.Spec.ClonePod != "web" {
			t.Errorf("the stored clone has %q", got.Spec.ClonePod)
		}
		labelled := must[*corev1.Pod](t)(pods.Patch(ctx, "kept", types.MergePatchType, []byte(`{"metadata":{"labels":{"new":"label"}}}`), metav1.PatchOptions{}))
		if labelled.Spec.ClonePod != "web" {
			t.Errorf("after an update the stored clone has %q", labelled.Spec.ClonePod)
		}
		// Alice needs no right for a field that does not exist.
		eventually(ctx, t, "create with the field while the gate is off", func() error {
			created, err := plane.client(t, "alice").CoreV1().Pods(namespace).Create(ctx, newPod("ordinary", "n2", cloning("nonsense")), metav1.CreateOptions{})
			if err == nil && created.Spec.ClonePod != "" {
				err = fmt.Errorf("the field was kept: %q", created.Spec.ClonePod)
			}
			return err
		})
		if err := readSource(); !apierrors.IsForbidden(err) {
			t.Errorf("node b reads the source: %v", err)
		}
	})
}

func testWhoMayClone(ctx context.Context, t *testing.T, plane *controlPlane, admin kubernetes.Interface) {
	alice := plane.client(t, "alice").CoreV1().Pods(namespace)
	dryRun := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	eventually(ctx, t, "alice may create pods", func() error {
		_, err := alice.Create(ctx, newPod("probe", ""), dryRun)
		return err
	})
	refused := func(source, part string) {
		t.Helper()
		_, err := alice.Create(ctx, newPod("web-2", "n2", cloning(source)), dryRun)
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), part) {
			t.Errorf("got %v, want it forbidden: %s", err, part)
		}
	}
	refused("web", `user "alice" may not clone the pod "web" in namespace "shop"`)
	refused("gone", `user "alice" may not clone the pod "gone"`)

	must[*rbacv1.Role](t)(admin.RbacV1().Roles(namespace).Create(ctx, &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: "clone-web"},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, ResourceNames: []string{"web", "soon"}, Verbs: []string{"clone"}}},
	}, metav1.CreateOptions{}))
	bind(ctx, t, admin, "clone-web")
	eventually(ctx, t, "alice may clone web", func() error {
		_, err := alice.Create(ctx, newPod("web-2", "n2", cloning("web")), dryRun)
		return err
	})
	refused("gone", `user "alice" may not clone the pod "gone"`)
	refused("soon", `there is no pod "soon" in namespace "shop"`)

	created := must[*corev1.Pod](t)(alice.Create(ctx, newPod("", "n2", cloning("web"), func(pod *corev1.Pod) { pod.GenerateName = "web-" }), metav1.CreateOptions{}))
	if created.Spec.ClonePod != "web" || created.Name == "" {
		t.Errorf("created %q with %q", created.Name, created.Spec.ClonePod)
	}
	if got := must[*corev1.Pod](t)(plane.protobufClient(t, "admin").CoreV1().Pods(namespace).Get(ctx, created.Name, metav1.GetOptions{})); got.Spec.ClonePod != "web" {
		t.Errorf("in protobuf it is %q", got.Spec.ClonePod)
	}
}

func testWhatMayBeCloned(ctx context.Context, t *testing.T, plane *controlPlane) {
	admin := plane.client(t, "admin")
	pods := admin.CoreV1().Pods(namespace)
	dryRun := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	must[*corev1.Pod](t)(pods.Create(ctx, newPod("finished", "n1"), metav1.CreateOptions{}))
	setPhase(ctx, t, admin, "finished", corev1.PodSucceeded)

	yes := true
	tests := []struct {
		name string
		pod  *corev1.Pod
		want string
	}{
		{name: "the administrator may", pod: newPod("web-2", "n2", cloning("web"))},
		{name: "itself", pod: newPod("web", "n2", cloning("web")), want: "must be the name of another pod"},
		{name: "not a name", pod: newPod("web-2", "n2", cloning("../web")), want: "RFC 1123"},
		{name: "unknown", pod: newPod("web-2", "n2", cloning("gone")), want: "there is no pod"},
		{name: "finished", pod: newPod("web-2", "n2", cloning("finished")), want: "has finished (Succeeded)"},
		{name: "another service account", pod: newPod("web-2", "n2", cloning("web"), func(pod *corev1.Pod) { pod.Spec.ServiceAccountName = "other" }), want: "spec.serviceAccountName"},
		{name: "privileged", pod: newPod("web-2", "n2", cloning("web"), func(pod *corev1.Pod) {
			pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: &yes}
		}), want: "spec.containers[0].securityContext.privileged"},
		{name: "host network", pod: newPod("web-2", "n2", cloning("web"), func(pod *corev1.Pod) { pod.Spec.HostNetwork = true }), want: "spec.hostNetwork"},
		{name: "host path", pod: newPod("web-2", "n2", cloning("web"), func(pod *corev1.Pod) {
			pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: "etc", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/etc"}}})
		}), want: "host path /etc"},
		{name: "a container more", pod: newPod("web-2", "n2", cloning("web"), func(pod *corev1.Pod) {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "shell", Image: "example.org/shell"})
		}), want: "has no such container"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			_, err := pods.Create(ctx, tc.pod, dryRun)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}

	t.Run("deployment", func(t *testing.T) {
		labels := map[string]string{"app": "web"}
		template := newPod("", "", cloning("web"))
		template.Spec.TerminationGracePeriodSeconds = nil
		_, err := admin.AppsV1().Deployments(namespace).Create(ctx, &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec: appsv1.DeploymentSpec{
				Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: template.Spec},
			},
		}, dryRun)
		if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "may not be set in a pod template") {
			t.Errorf("got %v", err)
		}
	})
}

// testWhereClonesMayRun gets clones onto nodes, in all the ways in which a pod gets its node.
func testWhereClonesMayRun(ctx context.Context, t *testing.T, plane *controlPlane) {
	core := plane.client(t, "admin").CoreV1()
	pods := core.Pods(namespace)
	must[*corev1.Pod](t)(pods.Create(ctx, newPod("unbound", "", cloning("web")), metav1.CreateOptions{}))
	must[*corev1.Pod](t)(pods.Create(ctx, newPod("unbound-ordinary", ""), metav1.CreateOptions{}))
	ways := map[string]func(clone bool, node string) error{
		"created": func(clone bool, node string) error {
			pod := newPod("created", node)
			if clone {
				cloning("web")(pod)
			}
			_, err := pods.Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		},
	}
	name := map[bool]string{true: "unbound", false: "unbound-ordinary"}
	binding := func(clone bool, node string) *corev1.Binding {
		return &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name[clone]}, Target: corev1.ObjectReference{Kind: "Node", Name: node}}
	}
	dryRun := &metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	ways["bound"] = func(clone bool, node string) error {
		return pods.Bind(ctx, binding(clone, node), *dryRun)
	}
	ways["bound as in old times"] = func(clone bool, node string) error {
		return core.RESTClient().Post().Namespace(namespace).Resource("bindings").VersionedParams(dryRun, scheme.ParameterCodec).Body(binding(clone, node)).Do(ctx).Error()
	}
	for way, try := range ways {
		t.Run(way, func(t *testing.T) {
			for _, tc := range []struct {
				clone      bool
				node, want string
			}{
				{true, "b", ""},
				{true, "old", `node "old" cannot take over pods: its status does not declare the feature PodMigration`},
				{true, "nowhere", `there is no node "nowhere"`},
				{false, "b", ""},
				{false, "old", ""},
				{false, "nowhere", ""},
			} {
				err := try(tc.clone, tc.node)
				if tc.want == "" && err != nil || tc.want != "" && (!apierrors.IsForbidden(err) || !strings.Contains(err.Error(), tc.want)) {
					t.Errorf("clone %t on node %s: %v, want %q", tc.clone, tc.node, err, tc.want)
				}
			}
		})
	}
	for _, pod := range name {
		if err := pods.Delete(ctx, pod, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	}
}

// testOldClients changes a clone in all the ways of clients that do not know the field.
func testOldClients(ctx context.Context, t *testing.T, plane *controlPlane) {
	pods := plane.client(t, "admin").CoreV1().Pods(namespace)
	manifest := func(clonePod, label string) string {
		field := ""
		if clonePod != "" {
			field = "  clonePod: " + clonePod + "\n"
		}
		return "apiVersion: v1\nkind: Pod\nmetadata:\n  name: applied\n  namespace: shop\n  labels:\n    step: " + label + "\nspec:\n" + field +
			"  containers:\n  - name: app\n    image: example.org/app:1\n"
	}
	check := func(t *testing.T, label string) {
		t.Helper()
		got := must[*corev1.Pod](t)(pods.Get(ctx, "applied", metav1.GetOptions{}))
		if got.Spec.ClonePod != "web" || got.Labels["step"] != label {
			t.Errorf("clonePod %q, labels %v", got.Spec.ClonePod, got.Labels)
		}
	}
	apply := func(t *testing.T, manifest string, flags ...string) {
		t.Helper()
		if out, err := plane.kubectl(t, "admin", manifest, append([]string{"apply", "-f", "-"}, flags...)...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}

	t.Run("kubectl apply", func(t *testing.T) {
		apply(t, manifest("web", "created"))
		check(t, "created")
		apply(t, manifest("web", "applied"))
		check(t, "applied")
		apply(t, manifest("", "applied-without"))
		check(t, "applied-without")
	})
	t.Run("server-side apply", func(t *testing.T) {
		apply(t, manifest("web", "server-side"), "--server-side", "--force-conflicts")
		check(t, "server-side")
		apply(t, manifest("", "by-another"), "--server-side", "--force-conflicts", "--field-manager=old-client")
		check(t, "by-another")
		apply(t, manifest("", "by-the-owner"), "--server-side", "--force-conflicts")
		check(t, "by-the-owner")
	})
	t.Run("read, change, write", func(t *testing.T) {
		// The old client's types have no such field: after reading it is gone.
		var known map[string]any
		raw := must[[]byte](t)(json.Marshal(must[*corev1.Pod](t)(pods.Get(ctx, "applied", metav1.GetOptions{}))))
		if err := json.Unmarshal(raw, &known); err != nil {
			t.Fatal(err)
		}
		delete(known["spec"].(map[string]any), "clonePod")
		known["metadata"].(map[string]any)["labels"] = map[string]string{"step": "written"}
		known["apiVersion"], known["kind"] = "v1", "Pod"
		body := must[[]byte](t)(json.Marshal(known))
		must[[]byte](t)(plane.client(t, "admin").CoreV1().RESTClient().Put().Namespace(namespace).Resource("pods").Name("applied").Body(body).DoRaw(ctx))
		check(t, "written")
	})
	t.Run("another source", func(t *testing.T) {
		for _, kind := range []types.PatchType{types.MergePatchType, types.StrategicMergePatchType} {
			if _, err := pods.Patch(ctx, "applied", kind, []byte(`{"spec":{"clonePod":"db"}}`), metav1.PatchOptions{}); !apierrors.IsInvalid(err) {
				t.Errorf("%s: %v", kind, err)
			}
		}
	})
	t.Run("an ordinary pod", func(t *testing.T) {
		if _, err := pods.Patch(ctx, "web", types.MergePatchType, []byte(`{"spec":{"clonePod":"db"}}`), metav1.PatchOptions{}); !apierrors.IsInvalid(err) {
			t.Errorf("it could be made a clone: %v", err)
		}
	})
}

// testNodes has a pod on node a and its clone on node b. Node c has nothing to do with them.
func testNodes(ctx context.Context, t *testing.T, plane *controlPlane, admin kubernetes.Interface) {
	pods := admin.CoreV1().Pods(namespace)
	must[*corev1.Pod](t)(pods.Create(ctx, newPod("db", "a"), metav1.CreateOptions{}))
	must[*corev1.Pod](t)(pods.Create(ctx, newPod("db-2", "b", cloning("db")), metav1.CreateOptions{}))

	node := func(name string) kubernetes.Interface { return plane.client(t, "system:node:"+name) }
	getPod := func(reader, pod string) error {
		_, err := node(reader).CoreV1().Pods(namespace).Get(ctx, pod, metav1.GetOptions{})
		return err
	}
	getNode := func(reader, other string) error {
		_, err := node(reader).CoreV1().Nodes().Get(ctx, other, metav1.GetOptions{})
		return err
	}
	forbidden := func(err error) error {
		if apierrors.IsForbidden(err) {
			return nil
		}
		return fmt.Errorf("want it forbidden, got %v", err)
	}

	eventually(ctx, t, "b reads the source", func() error { return getPod("b", "db") })
	eventually(ctx, t, "a reads the clone", func() error { return getPod("a", "db-2") })
	// From here on the API server knows both pods, and its answers are final.
	check := func(when string, allowed, denied map[string]error) {
		t.Helper()
		for what, err := range allowed {
			if err != nil {
				t.Errorf("%s: %s: %v", when, what, err)
			}
		}
		for what, err := range denied {
			if forbidden(err) != nil {
				t.Errorf("%s: %s: %v", when, what, forbidden(err))
			}
		}
	}
	_, watchErr := node("b").CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=db"})
	_, listErr := node("b").CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	_, allErr := node("b").CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	_, statusErr := node("b").CoreV1().Pods(namespace).Patch(ctx, "db", types.MergePatchType, []byte(`{"status":{"phase":"Failed"}}`), metav1.PatchOptions{}, "status")
	_, mirrorErr := node("c").CoreV1().Pods(namespace).Create(ctx, newPod("spy", "c", cloning("db"), func(pod *corev1.Pod) {
		pod.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "c", UID: must[*corev1.Node](t)(admin.CoreV1().Nodes().Get(ctx, "c", metav1.GetOptions{})).UID, Controller: ptrTo(true)}}
	}), metav1.CreateOptions{})
	check("both live",
		map[string]error{"b reads node a": getNode("b", "a"), "a reads node b": getNode("a", "b"), "b lists the source by name": watchErr},
		map[string]error{
			"c reads the source": getPod("c", "db"), "c reads the clone": getPod("c", "db-2"), "c reads node a": getNode("c", "a"), "b reads node c": getNode("b", "c"),
			"b lists pods": listErr, "b lists nodes": allErr, "b writes the source's status": statusErr, "c makes a mirror pod that clones": mirrorErr,
		})

	setPhase(ctx, t, admin, "db-2", corev1.PodFailed)
	eventually(ctx, t, "b is done with the source", func() error { return forbidden(getPod("b", "db")) })
	check("the clone has failed",
		map[string]error{"a reads the clone": getPod("a", "db-2"), "a reads node b": getNode("a", "b")},
		map[string]error{"b reads node a": getNode("b", "a")})

	setPhase(ctx, t, admin, "db", corev1.PodFailed)
	eventually(ctx, t, "a is done with the clone", func() error { return forbidden(getPod("a", "db-2")) })
	check("both have finished", nil, map[string]error{"a reads node b": getNode("a", "b"), "b reads the source": getPod("b", "db")})

	// A node is told "forbidden", not "not found", about pods that are gone, its own among them.
	if err := pods.Delete(ctx, "db-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "b is done with the clone", func() error { return forbidden(getPod("b", "db-2")) })
}

func ptrTo[T any](v T) *T { return &v }
