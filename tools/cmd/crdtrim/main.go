// Command crdtrim takes the descriptions out of the pod templates in definitions of custom
// resources, in place. They are Kubernetes' own and make a definition three times as large as
// kubectl apply can remember; descriptions of ours stay.
package main

import (
	"bytes"
	"fmt"
	"os"

	"sigs.k8s.io/yaml"
)

func main() {
	for _, file := range os.Args[1:] {
		if err := trimFile(file); err != nil {
			fmt.Fprintf(os.Stderr, "crdtrim: %s: %v\n", file, err)
			os.Exit(1)
		}
	}
}

func trimFile(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	out, err := trim(text)
	if err != nil || bytes.Equal(out, text) {
		return err
	}
	return os.WriteFile(file, out, 0o644)
}

// trim takes the descriptions out of all pod templates of a definition.
func trim(text []byte) ([]byte, error) {
	var definition map[string]any
	if err := yaml.Unmarshal(text, &definition); err != nil {
		return nil, err
	}
	found := false
	walk(definition, &found)
	if !found {
		return text, nil
	}
	out, err := yaml.Marshal(definition)
	return append([]byte("---\n"), out...), err
}

// walk looks for schemas of pod templates: a property template that has a spec with containers.
func walk(node any, found *bool) {
	switch x := node.(type) {
	case map[string]any:
		if template, ok := x["template"].(map[string]any); ok && isPodTemplate(template) {
			*found = true
			bare(template["properties"])
		}
		for _, child := range x {
			walk(child, found)
		}
	case []any:
		for _, child := range x {
			walk(child, found)
		}
	}
}

func isPodTemplate(schema map[string]any) bool {
	properties, _ := schema["properties"].(map[string]any)
	spec, _ := properties["spec"].(map[string]any)
	fields, _ := spec["properties"].(map[string]any)
	return fields["containers"] != nil
}

// bare removes the descriptions of all schemas below a map of properties. A property may
// itself be called description.
func bare(properties any) {
	fields, _ := properties.(map[string]any)
	for _, field := range fields {
		bareSchema(field)
	}
}

func bareSchema(node any) {
	schema, ok := node.(map[string]any)
	if !ok {
		return
	}
	delete(schema, "description")
	bare(schema["properties"])
	bareSchema(schema["items"])
	bareSchema(schema["additionalProperties"])
}
