package criu

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/utsns"
	"google.golang.org/protobuf/proto"
)

const magicUTS = 0x54473203

// SetHostName makes an image set restore these names. CRIU joins the UTS namespace of
// the new pod and writes into it what the images hold, which is the name of the old
// pod, and all containers and new processes of the pod would see it.
func SetHostName(images, host, domain string) error {
	files, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	for _, e := range files {
		if !strings.HasPrefix(e.Name(), "utsns-") {
			continue
		}
		var b bytes.Buffer
		w := newImageWriter(&b, magicUTS)
		if err := w.write(&utsns.UtsnsEntry{Nodename: proto.String(host), Domainname: proto.String(domain)}); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		if err := w.flush(); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(images, e.Name()), b.Bytes(), 0o600); err != nil {
			return err
		}
	}
	return nil
}
