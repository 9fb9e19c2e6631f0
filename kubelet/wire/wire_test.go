package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

func sampleFeatures() Features {
	return Features{
		StreamVersions: []uint32{2, 1}, RuntimeName: "containerd", RuntimeVersion: "v2.4.2", OCIRuntimeName: "runc",
		OCIRuntimeVersion: "1.5.2", CRIUVersion: "4.2.1", KernelRelease: "6.18.0", Architecture: "amd64",
		CPUFeatures: []string{"avx2", "sse4_2"}, CgroupMode: "hybrid", WriteTracking: true, LazyPages: true, TimeNamespace: true,
	}
}

// samples has one of every message; a new message has to be added here and gets a
// golden file with -rewrite.
func samples() map[string]any {
	fd := int32(7)
	return map[string]any{
		"open-request": &OpenRequest{
			Clone: "redis-2", SourceUID: "0b4c3d52-7c83-4c7e-9f0c-6d6a7d5b8f11", TargetNode: "n2", Features: sampleFeatures(),
			Containers: []TargetContainer{
				{Name: "redis", Image: "podmig.dev/redis:1", ImageDigest: "sha256:aa", Mounts: []string{"/data"}},
				{Name: "proxy", Image: "podmig.dev/proxy:1", Sidecar: true},
			},
			Volumes: []Volume{{Name: "data", Kind: "emptyDir"}}, MemoryAvailable: 8 << 30,
		},
		"open-response": &OpenResponse{
			StreamVersion: 2, SourceNode: "n1", Features: sampleFeatures(),
			Containers: []SourceContainer{{Name: "redis", Image: "podmig.dev/redis:1", ImageDigest: "sha256:aa",
				RestartCount: 1, StartedAt: 1763715600000000000}},
			Volumes: []Volume{{Name: "data", Kind: "emptyDir"}}, MemoryBytes: 600 << 20, RootfsBytes: 4096,
			Findings: []Finding{{Severity: SeverityWarning, Code: "DeletedFile", Container: "redis", PID: 42, FD: &fd,
				Message: "file descriptor 7 is of a deleted file", Cure: "nothing to do, it is copied"}},
		},
		"freeze-request": &FreezeRequest{},
		"freeze-response": &FreezeResponse{FrozenAt: 1763715601000000000, StreamBytes: 600 << 20, FinalBytes: 1 << 20,
			FreezeDuration: 3e6, DumpDuration: 120e6},
		"commit-request":   &CommitRequest{ManifestDigest: strings.Repeat("0a", 32)},
		"commit-response":  &CommitResponse{},
		"done-request":     &DoneRequest{ResumedAt: 1763715601300000000},
		"failure-request":  &FailureRequest{Reason: "RestoreFailed", Message: "CRIU: can't restore a file"},
		"empty":            &Empty{},
		"status-response":  &StatusResponse{State: "Frozen", Reason: "Frozen", Message: "waits for the commit"},
		"outcome-response": &OutcomeResponse{Outcome: OutcomeFailed, Reason: "RestoreFailed", Message: "CRIU: can't restore a file"},
		"error": &Error{Code: CodePreflight, Message: "the pod cannot be moved", Cure: "close the ring",
			Details:  map[string]string{"kernel": "6.18"},
			Findings: []Finding{{Severity: SeverityBlocking, Code: "IOUring", Container: "redis", PID: 42, FD: &fd, Message: "descriptor 7 is an io_uring"}}},
		"unknown-version": unknownVersion("v9"),
	}
}

// TestGolden holds the form of every message: a change of it is a new version.
func TestGolden(t *testing.T) {
	for name, want := range samples() {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join("testdata", name+".json")
			enc, err := Encode(want)
			if err != nil {
				t.Fatal(err)
			}
			var pretty bytes.Buffer
			if err := json.Indent(&pretty, enc, "", "  "); err != nil {
				t.Fatal(err)
			}
			pretty.WriteByte('\n')
			if *rewrite {
				if err := os.WriteFile(path, pretty.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			golden, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(golden, pretty.Bytes()) {
				t.Errorf("encoded:\n%s\nwant:\n%s", pretty.Bytes(), golden)
			}
			got := reflect.New(reflect.TypeOf(want).Elem()).Interface()
			if err := Unmarshal(golden, got); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("decoded %+v, want %+v", got, want)
			}
		})
	}
}

func TestPaths(t *testing.T) {
	s := Session{Namespace: "default", Pod: "redis.0", ID: "c10e0000-1111-2222"}
	seen := map[string]Verb{}
	for _, v := range Verbs() {
		key := v.Method() + " " + s.Path(v)
		if old, ok := seen[key]; ok {
			t.Errorf("%s and %s are both %s", old, v, key)
		}
		seen[key] = v
		gotV, gotS, err := ParsePath(v.Method(), s.Path(v))
		if err != nil || gotV != v || gotS != s {
			t.Errorf("%s: got %s %+v, error %v", key, gotV, gotS, err)
		}
	}
	if len(seen) != len(methods) {
		t.Errorf("Verbs has %d verbs, there are %d", len(seen), len(methods))
	}
	base := "/migration/v1alpha1/namespaces/default/pods/redis/sessions/c10e0000-1111"
	for _, tc := range []struct {
		name, method, path string
		want               Code
	}{
		{"another service", "GET", "/pods", CodeUnknownPath},
		{"no version", "GET", "/migration/", CodeUnknownVersion},
		{"newer version", "POST", strings.Replace(base, "v1alpha1", "v1", 1), CodeUnknownVersion},
		{"too short", "GET", "/migration/v1alpha1/namespaces/default", CodeUnknownPath},
		{"too long", "GET", base + "/stream/again", CodeUnknownPath},
		{"slash at the end", "GET", base + "/", CodeUnknownPath},
		{"unknown verb", "POST", base + "/exec", CodeUnknownPath},
		{"wrong method", "POST", base + "/stream", CodeBadMethod},
		{"wrong method of the session", "PUT", base, CodeBadMethod},
		{"upper case", "GET", strings.Replace(base, "redis", "Redis", 1), CodeBadRequest},
		{"dots", "GET", strings.Replace(base, "redis", "..", 1), CodeBadRequest},
		{"empty pod", "GET", strings.Replace(base, "redis", "", 1), CodeBadRequest},
		{"empty session", "GET", "/migration/v1alpha1/namespaces/default/pods/redis/sessions/", CodeBadRequest},
		{"short session", "GET", "/migration/v1alpha1/namespaces/default/pods/redis/sessions/abc", CodeBadRequest},
		{"zero byte", "GET", base + "\x00", CodeBadRequest},
		{"long name", "GET", strings.Replace(base, "redis", strings.Repeat("a", 300), 1), CodeBadRequest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if v, s, err := ParsePath(tc.method, tc.path); CodeOf(err) != tc.want {
				t.Errorf("got %q %+v, error %v, want code %s", v, s, err, tc.want)
			}
		})
	}
	_, _, err := ParsePath("GET", "/migration/v7/x")
	var e *Error
	if !errors.As(err, &e) || e.Details["supported"] != Version || e.Cure == "" {
		t.Errorf("the refusal of a version does not name those supported: %+v", e)
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	long := strings.Repeat("x", MaxText+1)
	for _, tc := range []struct {
		name, body string
		want       Code
	}{
		{"nothing", "", CodeBadRequest},
		{"not JSON", "state=Frozen", CodeBadRequest},
		{"null", "null", CodeBadRequest},
		{"list", "[]", CodeBadRequest},
		{"text", `"x"`, CodeBadRequest},
		{"cut", `{"state":"Frozen"`, CodeBadRequest},
		{"unknown field", `{"state":"Frozen","soul":1}`, CodeBadRequest},
		{"twice", `{"state":"Frozen","state":"Open"}`, CodeBadRequest},
		{"twice in another case", `{"state":"Frozen","STATE":"Open"}`, CodeBadRequest},
		{"something behind", `{"state":"Frozen"} {}`, CodeBadRequest},
		{"wrong type", `{"state":5}`, CodeBadRequest},
		{"not UTF-8", "{\"state\":\"\xff\"}", CodeBadRequest},
		{"deep", strings.Repeat(`{"a":`, MaxDepth+1) + "1" + strings.Repeat("}", MaxDepth+1), CodeBadRequest},
		{"long text", `{"state":"` + long + `"}`, CodeBadRequest},
		{"long list", `{"state":[` + strings.Repeat("1,", MaxItems+1) + `1]}`, CodeBadRequest},
		{"large", `{"state":"` + strings.Repeat("x", MaxBody) + `"}`, CodeTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r StatusResponse
			if err := Unmarshal([]byte(tc.body), &r); CodeOf(err) != tc.want {
				t.Errorf("got %+v, error %v, want code %s", r, err, tc.want)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	open := func(change func(*OpenRequest)) Validator {
		r := samples()["open-request"].(*OpenRequest)
		change(r)
		return r
	}
	answer := func(change func(*OpenResponse)) Validator {
		r := samples()["open-response"].(*OpenResponse)
		change(r)
		return r
	}
	for _, tc := range []struct {
		name string
		v    Validator
	}{
		{"clone", open(func(r *OpenRequest) { r.Clone = "../x" })},
		{"source UID", open(func(r *OpenRequest) { r.SourceUID = "" })},
		{"target node", open(func(r *OpenRequest) { r.TargetNode = "" })},
		{"no containers", open(func(r *OpenRequest) { r.Containers = nil })},
		{"container twice", open(func(r *OpenRequest) { r.Containers = append(r.Containers, r.Containers[0]) })},
		{"volume twice", open(func(r *OpenRequest) { r.Volumes = append(r.Volumes, r.Volumes[0]) })},
		{"no stream version", open(func(r *OpenRequest) { r.Features.StreamVersions = nil })},
		{"no architecture", open(func(r *OpenRequest) { r.Features.Architecture = "" })},
		{"version 0", answer(func(r *OpenResponse) { r.StreamVersion = 0 })},
		{"answer without containers", answer(func(r *OpenResponse) { r.Containers = nil })},
		{"negative restarts", answer(func(r *OpenResponse) { r.Containers[0].RestartCount = -1 })},
		{"unknown severity", answer(func(r *OpenResponse) { r.Findings[0].Severity = "mild" })},
		{"reason is no word", &FailureRequest{Reason: "it failed"}},
		{"no reason", &FailureRequest{}},
		{"digest is no digest", &CommitRequest{ManifestDigest: strings.Repeat("z", 64)}},
		{"digest is short", &CommitRequest{ManifestDigest: "00"}},
		{"unknown outcome", &OutcomeResponse{Outcome: "maybe"}},
		{"error without code", &Error{Message: "x"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if CodeOf(tc.v.Validate()) != CodeBadRequest {
				t.Errorf("accepted: %+v", tc.v)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	codes := Codes()
	if len(codes) != len(statuses) {
		t.Errorf("%d codes, %d statuses", len(codes), len(statuses))
	}
	for _, c := range codes {
		if s := c.HTTPStatus(); s < 400 || s > 599 {
			t.Errorf("%s has status %d", c, s)
		}
	}
	if Code("of-tomorrow").HTTPStatus() != 500 {
		t.Error("an unknown code is not a server error")
	}
	err := error(Errorf(CodeBusy, "pod %s is being moved", "a"))
	if !errors.Is(err, &Error{Code: CodeBusy}) || errors.Is(err, &Error{Code: CodeAborted}) {
		t.Error("errors.Is does not compare codes")
	}
	if CodeOf(errors.New("x")) != "" || CodeOf(nil) != "" {
		t.Error("a code out of nothing")
	}
	if got := err.Error(); got != "pod a is being moved (busy)" {
		t.Errorf("%q", got)
	}
	if !slices.Contains(SupportedVersions, Version) {
		t.Error("this version is not supported")
	}
}

func TestSentence(t *testing.T) {
	for _, tc := range []struct{ name, message, cure, want string }{
		{"parts", "it is busy", "wait", "it is busy; wait"},
		{"sentences", "It uses io_uring.", "Turn io_uring off.", "It uses io_uring; turn io_uring off"},
		{"a name", "It cannot be dumped.", "CRIU 4.2 can.", "It cannot be dumped; CRIU 4.2 can"},
		{"no cure", "It is gone.", "", "It is gone"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Sentence(tc.message, tc.cure); got != tc.want {
				t.Errorf("%q", got)
			}
		})
	}
}

// FuzzUnmarshal: what is accepted has one form, and decoding it again changes nothing.
func FuzzUnmarshal(f *testing.F) {
	var names []string
	for name := range samples() {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		b, err := Encode(samples()[name])
		if err != nil {
			f.Fatal(err)
		}
		f.Add(i, b)
	}
	f.Fuzz(func(t *testing.T, which int, b []byte) {
		typ := reflect.TypeOf(samples()[names[uint(which)%uint(len(names))]]).Elem()
		one := reflect.New(typ).Interface()
		if err := Unmarshal(b, one); err != nil {
			return
		}
		enc, err := Encode(one)
		if err != nil {
			return // Larger than what came in, for example because of escapes.
		}
		two := reflect.New(typ).Interface()
		if err := Unmarshal(enc, two); err != nil {
			t.Fatalf("%s became %s: %v", b, enc, err)
		}
		again, err := Encode(two)
		if err != nil || !bytes.Equal(enc, again) {
			t.Fatalf("%s became %s, error %v", enc, again, err)
		}
	})
}

func FuzzParsePath(f *testing.F) {
	s := Session{Namespace: "default", Pod: "redis", ID: "c10e0000-1111-2222"}
	for _, v := range Verbs() {
		f.Add(v.Method(), s.Path(v))
	}
	f.Fuzz(func(t *testing.T, method, path string) {
		v, s, err := ParsePath(method, path)
		if err != nil {
			if CodeOf(err) == "" {
				t.Errorf("%v has no code", err)
			}
			return
		}
		if s.Path(v) != path || v.Method() != method {
			t.Errorf("%s %s was read as %s %s", method, path, v.Method(), s.Path(v))
		}
	})
}
