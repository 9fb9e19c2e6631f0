// Package nodeconfig renders the configuration files of a node: containerd, kubelet, kube-proxy, CNI, CRIU and the systemd units.
//
// The same files serve the node image, the local cluster and an operator's own hosts; what differs between them is a value
// in Values. The package writes nothing, and it knows only the files that podmig has an opinion about.
package nodeconfig

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"text/template"
)

// Values are what the files depend on.
type Values struct {
	Name                string
	PauseImage          string
	RestrictOOMScoreAdj bool   // The host lacks CAP_SYS_RESOURCE.
	CgroupDriver        string // "cgroupfs" or "systemd".
	Nested              bool   // The node shares its machine with others.
	ClusterDNS          string // Empty when the cluster has none.
	ClusterCIDR         string
	PodCIDR             string // Empty leaves the CNI configuration out, for clusters that have a network already.
	PortmapBackend      string // "nftables" or "iptables".
	ProxyMode           string // Empty leaves kube-proxy out, likewise.
	FeatureGates        map[string]bool
}

// File is one file of a node.
type File struct {
	Path    string // Absolute, in the node.
	Content []byte
	Mode    fs.FileMode
}

//go:embed files
var files embed.FS

// placed says where the embedded files belong; the templates among them end in ".tmpl".
var placed = map[string]string{
	"containerd.toml.tmpl": "/etc/containerd/config.toml",
	"kubelet.yaml.tmpl":    "/etc/kubernetes/kubelet.yaml",
	"kube-proxy.yaml.tmpl": "/etc/kubernetes/kube-proxy.yaml",
	"cni.conflist.tmpl":    "/etc/cni/net.d/10-podmig.conflist",
	"sysctl.conf":          "/etc/sysctl.d/90-podmig.conf",
	"containerd.service":   "/etc/systemd/system/containerd.service",
	"kubelet.service":      "/etc/systemd/system/kubelet.service",
}

// Render returns all files of a node, in a fixed order.
func Render(values Values) ([]File, error) {
	var rendered []File
	for _, name := range slices.Sorted(maps.Keys(placed)) {
		if name == "cni.conflist.tmpl" && values.PodCIDR == "" || name == "kube-proxy.yaml.tmpl" && values.ProxyMode == "" {
			continue
		}
		content, err := files.ReadFile("files/" + name)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if strings.HasSuffix(name, ".tmpl") {
			if content, err = execute(name, string(content), values); err != nil {
				return nil, err
			}
		}
		rendered = append(rendered, File{Path: placed[name], Content: content, Mode: 0o644})
	}
	return rendered, nil
}

func execute(name, text string, values Values) ([]byte, error) {
	parsed, err := template.New(name).Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", name, err)
	}
	var out bytes.Buffer
	if err := parsed.Execute(&out, values); err != nil {
		return nil, fmt.Errorf("render %s: %w", name, err)
	}
	return out.Bytes(), nil
}
