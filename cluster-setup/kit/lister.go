package kit

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

type object = runtime.Object

// lister turns a typed client into what client-go's waits want.
type lister struct {
	list  func(metav1.ListOptions) (object, error)
	watch func(metav1.ListOptions) (watch.Interface, error)
}

// named restricts it to the object of one name.
func (l lister) named(name string) cache.ListerWatcher {
	selector := fields.OneTermEqualSelector("metadata.name", name).String()
	return &cache.ListWatch{
		ListFunc: func(o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return l.list(o)
		},
		WatchFunc: func(o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return l.watch(o)
		},
	}
}
