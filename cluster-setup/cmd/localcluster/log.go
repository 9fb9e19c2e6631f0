package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"
)

// followEvery is how often a followed log is looked at; a reader's eye needs no more.
const followEvery = 200 * time.Millisecond

func showLog(ctx context.Context, out io.Writer, path string, follow bool) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer file.Close()
	for {
		if _, err := io.Copy(out, file); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(followEvery):
		}
	}
}
