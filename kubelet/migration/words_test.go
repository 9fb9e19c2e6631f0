package migration_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"testing"

	api "podmig.dev/podmig/kubelet/apis/migration/v1alpha1"
	"podmig.dev/podmig/kubelet/migration"
	"podmig.dev/podmig/kubelet/peer"
	"podmig.dev/podmig/kubelet/wire"
)

// TestWords: the engine imports neither the API nor the wire, so its words are
// written down twice. They have to be the same.
func TestWords(t *testing.T) {
	engine := constants(t, "reason.go")
	for name, word := range constants(t, "../apis/migration/v1alpha1/words.go") {
		if name == "ConditionCloned" || name == "ConditionDisruptionTarget" {
			continue
		}
		found := false
		for _, w := range engine {
			found = found || w == word
		}
		if !found {
			t.Errorf("the API says %q (%s), the engine does not", word, name)
		}
	}
	words := map[string]bool{}
	for _, w := range constants(t, "../apis/migration/v1alpha1/words.go") {
		words[w] = true
	}
	for name, w := range engine {
		if !words[w] {
			t.Errorf("the engine says %q (%s), the API does not", w, name)
		}
	}
	for _, c := range []migration.Code{migration.CodeWrongState, migration.CodeAborted, migration.CodeGivenAway,
		migration.CodeReturned, migration.CodeReleased, migration.CodeNotDurable} {
		known := false
		for _, w := range wire.Codes() {
			known = known || string(w) == string(c)
		}
		if !known {
			t.Errorf("code %q is not on the wire", c)
		}
	}
	for v, p := range map[migration.Verdict]peer.Verdict{
		migration.VerdictOK: peer.VerdictOK, migration.VerdictRefused: peer.VerdictRefused,
		migration.VerdictGone: peer.VerdictGone, migration.VerdictNoAnswer: peer.VerdictNoAnswer,
	} {
		if string(v) != string(p) {
			t.Errorf("verdict %q is %q at the peer", v, p)
		}
	}
	for o, w := range map[migration.Outcome]wire.Outcome{
		migration.OutcomePending: wire.OutcomePending, migration.OutcomeRestored: wire.OutcomeRestored,
		migration.OutcomeFailed: wire.OutcomeFailed, migration.OutcomeGone: wire.OutcomeGone,
	} {
		if string(o) != string(w) {
			t.Errorf("outcome %q is %q on the wire", o, w)
		}
	}
	for _, v := range []migration.Verb{migration.VerbOpen, migration.VerbStream, migration.VerbFreeze, migration.VerbCommit,
		migration.VerbDone, migration.VerbFailed, migration.VerbAbort} {
		if wire.Verb(v).Method() == "" {
			t.Errorf("verb %q is not on the wire", v)
		}
	}
	if api.ReasonCloned != string(migration.ReasonCloned) || api.ReasonMigrated != string(migration.ReasonMigrated) {
		t.Error("the two words that everybody looks for differ")
	}
}

// constants are the string constants of a file, by name.
func constants(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		for i, v := range spec.Values {
			if lit, ok := v.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if s, err := strconv.Unquote(lit.Value); err == nil {
					out[spec.Names[i].Name] = s
				}
			}
		}
		return true
	})
	if len(out) == 0 {
		t.Fatalf("%s has no constants", path)
	}
	return out
}
