package runc

import (
	"context"
	"os"
	"os/exec"
	goruntime "runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"podmig.dev/podmig/containerd-cri/runtime"
)

// Features implements runtime.Runtime.
func (r *Runtime) Features(ctx context.Context) (runtime.Features, error) {
	f := runtime.Features{
		OCIName:      "runc",
		Architecture: goruntime.GOARCH,
		CgroupMode:   r.cgroups.mode(),
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		f.KernelRelease = unix.ByteSliceToString(uts.Release[:])
	}
	f.OCIVersion = firstVersion(ctx, "runc", "--version")
	f.CRIUVersion = firstVersion(ctx, "criu", "--version")
	f.CPUFeatures = cpuFeatures("/proc/cpuinfo")
	f.WriteTracking, f.LazyPages = userfaultFeatures()
	f.SoftDirty = softDirty()
	_, err := os.Stat("/proc/self/ns/time")
	f.TimeNamespace = err == nil
	return f, nil
}

// firstVersion returns the first word of a program's output that looks like a
// version, empty when the program is not there.
func firstVersion(ctx context.Context, name string, args ...string) string {
	b, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return ""
	}
	for _, w := range strings.Fields(string(b)) {
		if w = strings.TrimPrefix(w, "v"); w != "" && w[0] >= '0' && w[0] <= '9' {
			return w
		}
	}
	return ""
}

// cpuFeatures returns the flags that all processors have.
func cpuFeatures(file string) []string {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	var common []string
	first := true
	for line := range strings.SplitSeq(string(b), "\n") {
		key, val, ok := strings.Cut(line, ":")
		key = strings.TrimSpace(key)
		if !ok || (key != "flags" && key != "Features") {
			continue
		}
		flags := strings.Fields(val)
		slices.Sort(flags)
		if first {
			common, first = flags, false
			continue
		}
		common = slices.DeleteFunc(common, func(s string) bool {
			_, found := slices.BinarySearch(flags, s)
			return !found
		})
	}
	return slices.Compact(common)
}
