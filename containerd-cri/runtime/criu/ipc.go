package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
)

const (
	magicMM = 0x57492820

	vmaSysVIPC = 1 << 10
)

// emptyImage is the length of an image without entries.
const emptyImage = 8

// The containers of a pod share an IPC namespace, and every dump holds all of its
// System V objects. They can be restored once only, with the container whose
// processes have a segment mapped.

// IPC tells whether an image set holds System V IPC objects, and whether one of its
// processes has a segment of shared memory mapped.
func IPC(images string) (objects, mapped bool, err error) {
	files, err := os.ReadDir(images)
	if err != nil {
		return false, false, err
	}
	for _, e := range files {
		path := filepath.Join(images, e.Name())
		switch {
		case ipcObjects(e.Name()):
			info, err := e.Info()
			if err != nil {
				return false, false, err
			}
			objects = objects || info.Size() > emptyImage
		case strings.HasPrefix(e.Name(), "mm-"):
			m, err := mapsSysV(path)
			if err != nil {
				return false, false, fmt.Errorf("%s: %w", e.Name(), err)
			}
			mapped = mapped || m
		}
	}
	return objects, mapped, nil
}

func ipcObjects(name string) bool {
	for _, p := range []string{"ipcns-shm-", "ipcns-msg-", "ipcns-sem-"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

func mapsSysV(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, err := newImageReader(f, magicMM)
	if err != nil {
		return false, err
	}
	for {
		var e mm.MmEntry
		if err := r.next(&e); errors.Is(err, io.EOF) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		for _, v := range e.GetVmas() {
			if v.GetStatus()&vmaSysVIPC != 0 {
				return true, nil
			}
		}
	}
}

// DropIPC removes the System V IPC objects from an image set.
func DropIPC(images string) error {
	files, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	for _, e := range files {
		if !ipcObjects(e.Name()) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if info.Size() > emptyImage {
			if err := os.Truncate(filepath.Join(images, e.Name()), emptyImage); err != nil {
				return err
			}
		}
	}
	return nil
}
