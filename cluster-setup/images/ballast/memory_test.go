package main

import (
	"context"
	"testing"
	"time"
)

func TestMemoryIsChecked(t *testing.T) {
	t.Parallel()
	m, err := newMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	m.fill()
	if err := m.check(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	m.dirty(ctx, 10<<20)
	if m.writes.Load() == 0 {
		t.Error("nothing was written")
	}
	if err := m.check(); err != nil {
		t.Errorf("after writing: %v", err)
	}
	m.bytes[123456] ^= 1
	if err := m.check(); err == nil {
		t.Error("a changed byte was not noticed")
	}
}

func TestNoMemory(t *testing.T) {
	t.Parallel()
	m, err := newMemory(0)
	if err != nil {
		t.Fatal(err)
	}
	m.fill()
	if err := m.check(); err != nil {
		t.Error(err)
	}
}
