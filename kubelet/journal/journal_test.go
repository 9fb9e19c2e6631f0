package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"podmig.dev/podmig/kubelet/migration"
)

func record(state migration.SourceState, session string) migration.Record {
	return migration.Record{
		Version: migration.RecordVersion, Side: migration.SideSource, State: string(state),
		Identity: migration.Identity{Session: session, Namespace: "default", SourcePod: "redis",
			Containers: []migration.Container{{Name: "redis", ID: "c1"}}, Data: json.RawMessage(`{"a":"b"}`)},
	}
}

func TestPutListDelete(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "migrations")
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	one, two := record(migration.SourcePreparing, "1111"), record(migration.SourceGivenAway, "2222")
	target := record("", "1111")
	target.Side, target.State = migration.SideTarget, string(migration.TargetCommitting)
	for _, r := range []migration.Record{two, one, target} {
		if err := j.Put(r); err != nil {
			t.Fatal(err)
		}
	}
	one.State = string(migration.SourceGivenAway)
	if err := j.Put(one); err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := again.List()
	if err != nil {
		t.Fatal(err)
	}
	if want := []migration.Record{one, two, target}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "source-1111.json"): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != mode {
			t.Errorf("%s has mode %s, want %s", path, info.Mode().Perm(), mode)
		}
	}
	for range 2 {
		if err := j.Delete(migration.SideSource, "1111"); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := j.List(); err != nil || len(got) != 2 {
		t.Errorf("after Delete: %d records, error %v", len(got), err)
	}
}

func TestRefusals(t *testing.T) {
	j, err := Open(t.TempDir() + "/j")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*migration.Record)
	}{
		{"way out of the directory", func(r *migration.Record) { r.Identity.Session = "../../etc/x" }},
		{"hidden file", func(r *migration.Record) { r.Identity.Session = ".x" }},
		{"no session", func(r *migration.Record) { r.Identity.Session = "" }},
		{"no side", func(r *migration.Record) { r.Side = "" }},
		{"state that is not recorded", func(r *migration.Record) { r.State = string(migration.SourceFrozen) }},
		{"other version", func(r *migration.Record) { r.Version = 2 }},
		{"too large", func(r *migration.Record) { r.Message = strings.Repeat("x", maxSize) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := record(migration.SourceGivenAway, "1111")
			tc.change(&r)
			if err := j.Put(r); err == nil {
				t.Error("accepted")
			}
		})
	}
	if err := j.Delete(migration.SideSource, "../x"); err == nil {
		t.Error("Delete accepted a way out of the directory")
	}
	if got, err := j.List(); err != nil || len(got) != 0 {
		t.Errorf("%d records, error %v", len(got), err)
	}
	if _, err := Open("relative"); err == nil {
		t.Error("Open accepted a relative path")
	}
	open := t.TempDir() + "/open"
	if err := os.Mkdir(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(open); err == nil {
		t.Error("Open accepted a directory that everybody reads")
	}
}

// TestBadFiles: a damaged or unknown file is named, kept, and does not hide the others.
func TestBadFiles(t *testing.T) {
	good, err := encode(record(migration.SourceGivenAway, "1111"))
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func(string) string) string { return f(string(good)) }
	for _, tc := range []struct {
		name, file, content, says string
	}{
		{"empty", "source-1111.json", "", "not a record"},
		{"cut", "source-1111.json", edit(func(s string) string { return s[:len(s)/2] }), "not a record"},
		{"one bit", "source-1111.json", edit(func(s string) string { return strings.Replace(s, "redis", "rediz", 1) }), "checksum"},
		{"other format", "source-1111.json", edit(func(s string) string { return strings.Replace(s, `"format":1`, `"format":9`, 1) }), "format 9"},
		{"more behind", "source-1111.json", edit(func(s string) string { return s + s }), "follows"},
		{"renamed", "source-2222.json", string(good), "not what the name says"},
		{"other side", "target-1111.json", string(good), "not what the name says"},
		{"not a record", "notes.txt", "hello", "name"},
		{"newer version", "source-1111.json", envelopeOf(`{"version":7,"side":"source","soul":"new"}`), "version 7"},
		{"unknown field", "source-1111.json", envelopeOf(`{"version":1,"side":"source","soul":"new"}`), "soul"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir() + "/j"
			j, err := Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := j.Put(record(migration.SourceGivenAway, "9999")); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, tc.file)
			if err := os.WriteFile(path, []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if j, err = Open(dir); err != nil {
				t.Fatal(err)
			}
			got, err := j.List()
			var bad *BadRecord
			if !errors.As(err, &bad) || bad.Path != path || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want a BadRecord about %s that says %q", err, path, tc.says)
			}
			if len(got) != 1 || got[0].Identity.Session != "9999" {
				t.Errorf("the good record is missing: %+v", got)
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("the bad file is gone: %v", err)
			}
		})
	}
	t.Run("link", func(t *testing.T) {
		dir := t.TempDir() + "/j"
		j, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/etc/passwd", filepath.Join(dir, "source-1111.json")); err != nil {
			t.Fatal(err)
		}
		if _, err := j.List(); err == nil || strings.Contains(err.Error(), "root") {
			t.Errorf("a link was followed: %v", err)
		}
	})
}

func envelopeOf(rec string) string {
	b, err := json.Marshal(envelope{Format: format, SHA256: checksum([]byte(rec)), Record: json.RawMessage(rec)})
	if err != nil {
		panic(err)
	}
	return string(b)
}

// TestPowerLoss cuts the power after every step of a Put and of a Delete: what is
// found is the old or the new record, whole, and the new one once the call returned.
func TestPowerLoss(t *testing.T) {
	before, after := record(migration.SourcePreparing, "1111"), record(migration.SourceGivenAway, "1111")
	for _, tc := range []struct {
		name  string
		call  func(*Journal) error
		done  []migration.Record
		first bool
	}{
		{"first put", func(j *Journal) error { return j.Put(after) }, []migration.Record{after}, true},
		{"put", func(j *Journal) error { return j.Put(after) }, []migration.Record{after}, false},
		{"delete", func(j *Journal) error { return j.Delete(after.Side, "1111") }, nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			worlds := 0
			for step := 0; ; step++ {
				mem := newMemory()
				j, err := open("/j", mem)
				if err != nil {
					t.Fatal(err)
				}
				var old []migration.Record
				if !tc.first {
					if err := j.Put(before); err != nil {
						t.Fatal(err)
					}
					old = []migration.Record{before}
				}
				mem.failAt, mem.err = mem.step+step, errLost
				err = tc.call(j)
				for _, found := range mem.afterPowerLoss() {
					worlds++
					j, openErr := open("/j", found)
					if openErr != nil {
						t.Fatal(openErr)
					}
					got, listErr := j.List()
					if listErr != nil {
						t.Fatalf("step %d: %v", step, listErr)
					}
					isOld, isNew := reflect.DeepEqual(got, old), reflect.DeepEqual(got, tc.done)
					switch {
					case !isOld && !isNew:
						t.Fatalf("step %d: found %+v", step, got)
					case err == nil && !isNew:
						t.Fatalf("step %d: the call returned and its change is gone", step)
					case err != nil && !errors.Is(err, ErrUncertain) && !isOld:
						t.Fatalf("step %d: %v is not uncertain and the record changed", step, err)
					}
				}
				if mem.failAt >= mem.step {
					break // Every step was cut.
				}
			}
			if worlds < 4 {
				t.Errorf("only %d worlds", worlds)
			}
		})
	}
}

// TestDiskFull: a record that exists can be replaced although the disk is full,
// because the journal keeps a reserve.
func TestDiskFull(t *testing.T) {
	mem := newMemory()
	j, err := open("/j", mem)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Put(record(migration.SourceGivenAway, "1111")); err != nil {
		t.Fatal(err)
	}
	mem.full = func(string) error {
		if mem.files["/j/"+reserveName] != nil {
			return fmt.Errorf("write: %w", syscall.ENOSPC)
		}
		return nil
	}
	if err := j.Put(record(migration.SourceReturning, "1111")); err != nil {
		t.Fatalf("with a reserve: %v", err)
	}
	mem.full = func(string) error { return syscall.ENOSPC }
	err = j.Put(record(migration.SourceReleasing, "1111"))
	if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrUncertain) {
		t.Errorf("without a reserve: %v", err)
	}
	mem.full = nil
	if err := j.Delete(migration.SideSource, "1111"); err != nil {
		t.Fatal(err)
	}
	if mem.files["/j/"+reserveName] == nil {
		t.Error("the reserve was not put back")
	}
}

func FuzzDecode(f *testing.F) {
	good, err := encode(record(migration.SourceGivenAway, "1111"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(envelopeOf(`{"version":1}`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decode(b)
		if err != nil {
			return
		}
		again, err := encode(r)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decode(again); err != nil || !reflect.DeepEqual(back, r) {
			t.Errorf("%+v became %+v, error %v", r, back, err)
		}
	})
}
