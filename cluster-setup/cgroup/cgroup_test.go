package cgroup

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

const (
	v1Lines = `30 20 0:25 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:1 - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
33 30 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
`
	unifiedLine = "34 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	v2Line      = "30 20 0:25 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
	copyLine    = "90 80 0:26 / /run/other/cpu rw - cgroup cgroup rw,cpu\n"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name      string
		mountinfo string
		mode      Mode
		names     []string // Folder names in a node.
		options   []string
	}{
		{"version 1", v1Lines, V1, []string{"cpu,cpuacct", "cpuset", "systemd"}, []string{"cpu,cpuacct", "cpuset", "none,name=systemd"}},
		{"hybrid", v1Lines + unifiedLine, Hybrid, []string{"cpu,cpuacct", "cpuset", "systemd", "unified"}, []string{"cpu,cpuacct", "cpuset", "none,name=systemd", ""}},
		{"version 2", v2Line, V2, []string{"unified"}, []string{""}},
		{"copies elsewhere are left out", v2Line + copyLine, V2, []string{"unified"}, []string{""}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			layout, err := parse(strings.NewReader(test.mountinfo))
			if err != nil {
				t.Fatal(err)
			}
			if layout.Mode != test.mode {
				t.Errorf("mode %s, want %s", layout.Mode, test.mode)
			}
			var names, options []string
			for _, hierarchy := range layout.Hierarchies {
				name, _, option := hierarchy.mountArguments()
				names, options = append(names, name), append(options, option)
			}
			if !reflect.DeepEqual(names, test.names) || !reflect.DeepEqual(options, test.options) {
				t.Errorf("got %q %q, want %q %q", names, options, test.names, test.options)
			}
		})
	}
}

func TestParseWithoutControlGroups(t *testing.T) {
	t.Parallel()
	if _, err := parse(strings.NewReader(copyLine)); !errors.Is(err, ErrNone) {
		t.Errorf("got %v, want %v", err, ErrNone)
	}
}
