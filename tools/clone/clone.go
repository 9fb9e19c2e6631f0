// Package clone writes the pod that takes over another one: the source's spec with
// what belongs to the source's own life left out and spec.clonePod set.
//
// It works on unstructured objects, so that fields which this program's API types do
// not know are carried over instead of lost. Pure; that such a pod really takes over
// is shown by the end-to-end tests.
package clone

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Options say how the clone differs from its source.
type Options struct {
	// Name of the clone, different from the source's.
	Name string
	// Node is where the clone has to run; empty for any node but the source's.
	Node string
}

// lastApplied is kubectl's memory of the source; in the clone it would be a lie.
const lastApplied = "kubectl.kubernetes.io/last-applied-configuration"

// tokenPath is where the API server mounts the token volume that it adds by itself.
const tokenPath = "/var/run/secrets/kubernetes.io/serviceaccount"

// Of returns the pod that takes over source, which has to be bound to a node.
func Of(source *unstructured.Unstructured, o Options) (*unstructured.Unstructured, error) {
	if source.GetKind() != "Pod" {
		return nil, fmt.Errorf("clone of a %s: only pods can be cloned", source.GetKind())
	}
	if o.Name == "" || o.Name == source.GetName() {
		return nil, fmt.Errorf("clone of pod %s: the clone needs a name of its own", source.GetName())
	}
	spec, ok, err := unstructured.NestedMap(source.Object, "spec")
	if err != nil || !ok {
		return nil, fmt.Errorf("clone of pod %s: the pod has no spec", source.GetName())
	}
	node, _, _ := unstructured.NestedString(spec, "nodeName")
	switch node {
	case "":
		return nil, fmt.Errorf("clone of pod %s: the pod is on no node yet; wait until it runs", source.GetName())
	case o.Node:
		return nil, fmt.Errorf("clone of pod %s: the pod is on node %s already", source.GetName(), node)
	}
	delete(spec, "nodeName")
	// Both are admission's work on the source and are done again for the clone.
	dropTokenVolume(spec)
	delete(spec, "priority")
	spec["clonePod"] = source.GetName()
	if err := place(spec, node, o.Node); err != nil {
		return nil, fmt.Errorf("clone of pod %s: %w", source.GetName(), err)
	}

	c := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	c.SetAPIVersion("v1")
	c.SetKind("Pod")
	c.SetName(o.Name)
	c.SetNamespace(source.GetNamespace())
	c.SetLabels(source.GetLabels())
	annotations := maps.Clone(source.GetAnnotations())
	delete(annotations, lastApplied)
	if len(annotations) > 0 {
		c.SetAnnotations(annotations)
	}
	return c, nil
}

// place adds a requirement to every term of the node affinity; terms are
// alternatives, requirements within a term are not.
func place(spec map[string]any, source, target string) error {
	requirement := map[string]any{"key": "metadata.name", "operator": "NotIn", "values": []any{source}}
	if target != "" {
		requirement["operator"], requirement["values"] = "In", []any{target}
	}
	path := []string{"affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"}
	terms, _, err := unstructured.NestedSlice(spec, path...)
	if err != nil {
		return fmt.Errorf("node affinity of the source: %w", err)
	}
	// A clone of a clone has such a requirement already, for another node.
	var kept []any
	for _, t := range terms {
		term, ok := t.(map[string]any)
		if !ok {
			continue
		}
		fields, _, _ := unstructured.NestedSlice(term, "matchFields")
		fields = slices.DeleteFunc(fields, func(f any) bool {
			m, ok := f.(map[string]any)
			return ok && m["key"] == "metadata.name"
		})
		term["matchFields"] = append(fields, requirement)
		kept = append(kept, term)
	}
	if len(kept) == 0 {
		kept = []any{map[string]any{"matchFields": []any{requirement}}}
	}
	return unstructured.SetNestedSlice(spec, kept, path...)
}

func dropTokenVolume(spec map[string]any) {
	names := map[string]bool{}
	for _, list := range []string{"initContainers", "containers"} {
		containers, _, _ := unstructured.NestedSlice(spec, list)
		for _, c := range containers {
			container, ok := c.(map[string]any)
			if !ok {
				continue
			}
			mounts, found, _ := unstructured.NestedSlice(container, "volumeMounts")
			if !found {
				continue
			}
			mounts = slices.DeleteFunc(mounts, func(m any) bool {
				mount, ok := m.(map[string]any)
				if !ok || mount["mountPath"] != tokenPath {
					return false
				}
				name, _ := mount["name"].(string)
				auto := strings.HasPrefix(name, "kube-api-access-")
				if auto {
					names[name] = true
				}
				return auto
			})
			container["volumeMounts"] = mounts
		}
		if len(containers) > 0 {
			spec[list] = containers
		}
	}
	volumes, found, _ := unstructured.NestedSlice(spec, "volumes")
	if !found {
		return
	}
	volumes = slices.DeleteFunc(volumes, func(v any) bool {
		volume, ok := v.(map[string]any)
		name, _ := volume["name"].(string)
		return ok && names[name]
	})
	spec["volumes"] = volumes
}
