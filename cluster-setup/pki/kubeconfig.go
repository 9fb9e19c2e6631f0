package pki

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// Kubeconfig renders a client configuration with everything inside, so that the file can be copied anywhere.
func Kubeconfig(cluster, server string, ca []byte, user string, client Pair) []byte {
	encode := base64.StdEncoding.EncodeToString
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Config
clusters:
- name: %[1]s
  cluster:
    server: %[2]s
    certificate-authority-data: %[3]s
users:
- name: %[4]q
  user:
    client-certificate-data: %[5]s
    client-key-data: %[6]s
contexts:
- name: %[1]s
  context:
    cluster: %[1]s
    user: %[4]q
current-context: %[1]s
`, cluster, server, encode(ca), user, encode(client.Cert), encode(client.Key))
	return []byte(b.String())
}
