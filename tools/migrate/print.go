package migrate

import (
	"cmp"
	"fmt"
	"io"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/printers"

	"podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
)

// outputs are what --output may be, beside nothing.
var outputs = []string{"name", "json", "yaml", "wide"}

// print writes the migration as asked for, or a name if nothing was asked for.
func (o *options) print(m *v1alpha1.PodMigration, name string) error {
	if o.output == "" {
		_, err := fmt.Fprintln(o.out, name)
		return err
	}
	return o.printObject(m)
}

func (o *options) printObject(m *v1alpha1.PodMigration) error {
	m.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodMigration"))
	switch o.output {
	case "name":
		return (&printers.NamePrinter{}).PrintObj(m, o.out)
	case "json":
		return (&printers.JSONPrinter{}).PrintObj(m, o.out)
	case "yaml":
		return (&printers.YAMLPrinter{}).PrintObj(m, o.out)
	case "wide":
		return printTable(o.out, true, []metav1.TableRow{cells(m.Spec.PodName, string(cmp.Or(m.Status.Phase, v1alpha1.PhasePending)), m.Status.Message, m)})
	}
	return nil
}

// printRows writes what has become of a node's pods: a table where people read it, and on
// the other stream what a program reads.
func (o *options) printRows(rows []row) error {
	all := &v1alpha1.PodMigrationList{}
	all.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodMigrationList"))
	var lines []metav1.TableRow
	for _, r := range rows {
		name := r.pod.Namespace + "/" + r.pod.Name
		if r.standing == moving || r.standing == ended {
			m := r.migration.DeepCopy()
			m.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodMigration"))
			all.Items = append(all.Items, *m)
			lines = append(lines, cells(name, string(cmp.Or(m.Status.Phase, v1alpha1.PhasePending)), m.Status.Message, m))
		} else if word := words[r.standing]; word != "" {
			lines = append(lines, cells(name, word, r.why, &v1alpha1.PodMigration{}))
		}
	}
	table := func(w io.Writer) error { return printTable(w, o.output == "wide", lines) }
	switch {
	case o.output == "json":
		if err := table(o.errOut); err != nil {
			return err
		}
		return (&printers.JSONPrinter{}).PrintObj(all, o.out)
	case o.output == "yaml":
		if err := table(o.errOut); err != nil {
			return err
		}
		return (&printers.YAMLPrinter{}).PrintObj(all, o.out)
	case o.output == "name" || o.output == "" && o.noWait:
		if err := table(o.errOut); err != nil {
			return err
		}
		for i := range all.Items {
			if err := (&printers.NamePrinter{}).PrintObj(&all.Items[i], o.out); err != nil {
				return err
			}
		}
		return nil
	}
	return table(o.out)
}

// words are the results of pods without a migration.
var words = map[standing]string{belonging: "Ignored", staying: "Stays", rejected: "NotOrdered", waiting: "HeldBack"}

// cells is a line of the table.
func cells(pod, result, message string, m *v1alpha1.PodMigration) metav1.TableRow {
	took := ""
	if t := m.Status.PhaseTransitions; len(t) > 1 && m.Status.Phase.Over() {
		took = t[len(t)-1].Time.Sub(t[0].Time.Time).Round(100 * time.Millisecond).String()
	}
	return metav1.TableRow{Cells: []any{
		pod, result, m.Status.SourceNode, cmp.Or(m.Status.TargetNode, m.Spec.TargetNode), m.Status.ClonePodName, m.Name, took, m.Status.Reason, message,
	}}
}

func printTable(w io.Writer, wide bool, rows []metav1.TableRow) error {
	t := &metav1.Table{Rows: rows, ColumnDefinitions: []metav1.TableColumnDefinition{
		{Name: "Pod", Type: "string"}, {Name: "Result", Type: "string"}, {Name: "Source", Type: "string", Priority: 1}, {Name: "Target", Type: "string"},
		{Name: "Clone", Type: "string", Priority: 1}, {Name: "Migration", Type: "string", Priority: 1}, {Name: "Took", Type: "string", Priority: 1},
		{Name: "Reason", Type: "string", Priority: 1}, {Name: "Message", Type: "string"},
	}}
	return printers.NewTablePrinter(printers.PrintOptions{Wide: wide}).PrintObj(t, w)
}

// meter says how much was moved, and how fast.
type meter struct {
	bytes int64
	at    time.Time
}

func (r *meter) read(m *v1alpha1.PodMigration, now time.Time) string {
	bytes := m.Status.TransferredBytes
	if bytes == 0 {
		return ""
	}
	text := size(bytes)
	if took := now.Sub(r.at).Seconds(); bytes > r.bytes && r.bytes > 0 && took > 0 && m.Status.Phase == v1alpha1.PhaseTransferring {
		text += fmt.Sprintf(", %s/s", size(int64(float64(bytes-r.bytes)/took)))
	}
	if bytes > r.bytes {
		r.bytes, r.at = bytes, now
	}
	if e := m.Status.ExpectedFreezeMilliseconds; e != nil && (m.Status.Phase == v1alpha1.PhaseTransferring || m.Status.Phase == v1alpha1.PhaseFreezing) {
		text += fmt.Sprintf(", to be frozen for %d ms and what the restore takes", *e)
	}
	if f := m.Status.FrozenMilliseconds; f != nil {
		text += fmt.Sprintf(", frozen for %d ms", *f)
	}
	return "(" + text + ")"
}

func size(bytes int64) string {
	if bytes < 10<<20 {
		return fmt.Sprintf("%d KiB", bytes>>10)
	}
	return fmt.Sprintf("%d MiB", bytes>>20)
}
