package agent

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestReadSigns(t *testing.T) {
	second := "E\x00\x00\x00\x00\x3b\x9a\xca\x00"
	for _, tt := range []struct {
		name, text string
		want       []time.Duration
		ok         bool
	}{
		{"ready at once", "R", nil, true},
		{"a runtime that expects something", second + second + "R", []time.Duration{time.Second, time.Second}, true},
		{"it ends before it is ready", second, []time.Duration{time.Second}, false},
		{"it ends in the middle", second[:5], nil, false},
		{"nothing", "", nil, false},
		{"an unknown sign", "x" + "R", nil, false},
	} {
		var got []time.Duration
		err := readSigns(strings.NewReader(tt.text), func(d time.Duration) { got = append(got, d) })
		if (err == nil) != tt.ok || !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, %v", tt.name, got, err)
		}
	}
}
