package nodeconfig

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	proxyconfig "k8s.io/kube-proxy/config/v1alpha1"
	kubeletconfig "k8s.io/kubelet/config/v1beta1"
	"sigs.k8s.io/yaml"
)

func local() Values {
	return Values{
		Name: "node1", PauseImage: "podmig.dev/pause:v1", RestrictOOMScoreAdj: true, CgroupDriver: "cgroupfs", Nested: true,
		ClusterDNS: "10.91.0.10", ClusterCIDR: "10.90.0.0/16", PodCIDR: "10.90.1.0/24", PortmapBackend: "nftables", ProxyMode: "nftables",
		FeatureGates: map[string]bool{"PodMigration": true},
	}
}

func operator() Values {
	return Values{PauseImage: "podmig.dev/pause:v1", CgroupDriver: "systemd"}
}

func render(t *testing.T, values Values) map[string]string {
	t.Helper()
	rendered, err := Render(values)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, file := range rendered {
		files[file.Path] = string(file.Content)
	}
	return files
}

func TestFilesOfALocalNode(t *testing.T) {
	t.Parallel()
	files := render(t, local())
	var kubelet kubeletconfig.KubeletConfiguration
	if err := yaml.UnmarshalStrict([]byte(files["/etc/kubernetes/kubelet.yaml"]), &kubelet); err != nil {
		t.Fatalf("kubelet: %v", err)
	}
	if *kubelet.Authentication.Anonymous.Enabled || kubelet.Authorization.Mode != "Webhook" || !kubelet.FeatureGates["PodMigration"] {
		t.Errorf("kubelet would let strangers in or not migrate: %+v", kubelet)
	}
	if kubelet.ClusterDNS[0] != "10.91.0.10" || *kubelet.FailCgroupV1 {
		t.Errorf("kubelet would not work here: %+v", kubelet)
	}
	var proxy proxyconfig.KubeProxyConfiguration
	if err := yaml.UnmarshalStrict([]byte(files["/etc/kubernetes/kube-proxy.yaml"]), &proxy); err != nil {
		t.Fatalf("kube-proxy: %v", err)
	}
	var runtime map[string]any
	if err := toml.Unmarshal([]byte(files["/etc/containerd/config.toml"]), &runtime); err != nil {
		t.Fatalf("containerd: %v", err)
	}
	if !strings.Contains(files["/etc/containerd/config.toml"], "restrict_oom_score_adj = true") {
		t.Error("containerd would fail without CAP_SYS_RESOURCE")
	}
	var network struct {
		Plugins []struct {
			IPAM struct{ Ranges [][]struct{ Subnet string } }
		}
	}
	if err := json.Unmarshal([]byte(files["/etc/cni/net.d/10-podmig.conflist"]), &network); err != nil {
		t.Fatalf("network: %v", err)
	}
	if network.Plugins[0].IPAM.Ranges[0][0].Subnet != "10.90.1.0/24" {
		t.Errorf("network has another subnet: %+v", network)
	}
}

func TestFilesOfAnOperatorsNode(t *testing.T) {
	t.Parallel()
	files := render(t, operator())
	for _, path := range []string{"/etc/cni/net.d/10-podmig.conflist", "/etc/kubernetes/kube-proxy.yaml"} {
		if _, there := files[path]; there {
			t.Errorf("%s would replace what the cluster has", path)
		}
	}
	var kubelet kubeletconfig.KubeletConfiguration
	if err := yaml.UnmarshalStrict([]byte(files["/etc/kubernetes/kubelet.yaml"]), &kubelet); err != nil {
		t.Fatal(err)
	}
	if kubelet.EvictionHard != nil || kubelet.EnforceNodeAllocatable != nil {
		t.Error("a node with a machine of its own must keep the kubelet's protection of it")
	}
	containerd := files["/etc/containerd/config.toml"]
	if strings.Contains(containerd, "restrict_oom_score_adj") || !strings.Contains(containerd, "SystemdCgroup = true") {
		t.Errorf("containerd configuration does not fit a host with systemd:\n%s", containerd)
	}
	for _, path := range []string{"/etc/systemd/system/kubelet.service", "/etc/systemd/system/containerd.service"} {
		if files[path] == "" {
			t.Errorf("%s is missing", path)
		}
	}
}

func TestRenderIsRepeatable(t *testing.T) {
	t.Parallel()
	first, err := Render(local())
	if err != nil {
		t.Fatal(err)
	}
	second, err := Render(local())
	if err != nil {
		t.Fatal(err)
	}
	for i := range first {
		if first[i].Path != second[i].Path || string(first[i].Content) != string(second[i].Content) {
			t.Fatalf("%s and %s differ", first[i].Path, second[i].Path)
		}
	}
}
