package manifests

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"sigs.k8s.io/yaml"
)

// What kubectl apply -k installs is everything there is.
func TestKustomization(t *testing.T) {
	text, err := os.ReadFile("kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var k struct{ Resources []string }
	if err := yaml.Unmarshal(text, &k); err != nil {
		t.Fatal(err)
	}
	want, err := filepath.Glob("crds/*.yaml")
	if err != nil || len(want) == 0 {
		t.Fatalf("%d definitions, %v", len(want), err)
	}
	if want = append(want, "rbac.yaml", "controller.yaml"); !slices.Equal(k.Resources, want) {
		t.Errorf("it has %v, want %v", k.Resources, want)
	}
}
