package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is that of podmig's objects.
var GroupVersion = schema.GroupVersion{Group: "podmig.dev", Version: "v1alpha1"}

// AddToScheme makes the types known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &PodMigration{}, &PodMigrationList{}, &MigratingPod{}, &MigratingPodList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
