//go:build podmig_patched

package apitest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	startTimeout = 2 * time.Minute
	stopTimeout  = 30 * time.Second
)

// The users of the tests and their groups. Nobody but the administrator has rights of their own.
var users = map[string]string{
	"admin":         "system:masters",
	"alice":         "",
	"system:node:a": "system:nodes",
	"system:node:b": "system:nodes",
	"system:node:c": "system:nodes",
}

// controlPlane is an etcd and the API server on top of it. The API server can be restarted with other flags, what it
// stored stays.
type controlPlane struct {
	dir    string
	etcd   string
	tokens map[string]string

	apiserver *process
	url       string
}

func newControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	c := &controlPlane{dir: t.TempDir(), tokens: map[string]string{}}

	var list strings.Builder
	for user, groups := range users {
		random := make([]byte, 16)
		if _, err := rand.Read(random); err != nil {
			t.Fatal(err)
		}
		c.tokens[user] = hex.EncodeToString(random)
		fmt.Fprintf(&list, "%s,%s,%s,%q\n", c.tokens[user], user, user, groups)
	}
	c.write(t, "tokens", []byte(list.String()))

	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	c.write(t, "sa.key", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))

	c.etcd = "http://" + freeAddress(t)
	peer := "http://" + freeAddress(t)
	startProcess(t, c.dir, "etcd",
		"--data-dir", c.file("etcd"),
		"--listen-client-urls", c.etcd, "--advertise-client-urls", c.etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	return c
}

func (c *controlPlane) file(name string) string { return filepath.Join(c.dir, name) }

func (c *controlPlane) write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(c.file(name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// serve starts the API server, after stopping the one that runs, and waits until it is ready.
func (c *controlPlane) serve(t *testing.T, flags ...string) {
	t.Helper()
	if c.apiserver != nil {
		c.apiserver.stop(t)
	}
	address := freeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	c.url = "https://" + address
	c.apiserver = startProcess(t, c.dir, "kube-apiserver", append([]string{
		"--etcd-servers", c.etcd,
		"--bind-address", "127.0.0.1", "--secure-port", port,
		// Loopback cannot be advertised; nobody uses this address, it is reserved for documentation.
		"--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none",
		"--cert-dir", c.file("certs"),
		"--token-auth-file", c.file("tokens"),
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction",
		"--service-account-issuer", "https://podmig.test", "--service-account-key-file", c.file("sa.key"),
		"--service-account-signing-key-file", c.file("sa.key"),
		"--service-cluster-ip-range", "10.96.0.0/16",
	}, flags...)...)

	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	var last error
	err = wait.PollUntilContextCancel(ctx, 100*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		if c.apiserver.exited() {
			return false, errors.New("it has ended")
		}
		// The certificate does not exist before the server has made it.
		client, err := kubernetes.NewForConfig(c.config("admin"))
		if err == nil {
			_, err = client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		}
		last = err
		return err == nil, nil
	})
	if err != nil {
		t.Fatalf("kube-apiserver does not become ready: %v, %v\n%s", err, last, c.apiserver.tail())
	}
}

func (c *controlPlane) config(user string) *rest.Config {
	return &rest.Config{
		Host:            c.url,
		BearerToken:     c.tokens[user],
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(c.file("certs"), "apiserver.crt")},
		QPS:             -1,
	}
}

func (c *controlPlane) client(t *testing.T, user string) kubernetes.Interface {
	t.Helper()
	client, err := kubernetes.NewForConfig(c.config(user))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// protobufClient speaks the language in which the components of Kubernetes and etcd get pods.
func (c *controlPlane) protobufClient(t *testing.T, user string) kubernetes.Interface {
	t.Helper()
	config := c.config(user)
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = config.ContentType
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// kubectl runs the real one as a user and returns what it prints, errors included.
func (c *controlPlane) kubectl(t *testing.T, user, stdin string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(t, "kubectl"), append([]string{
		"--server", c.url, "--token", c.tokens[user], "--certificate-authority", filepath.Join(c.file("certs"), "apiserver.crt"),
		"--kubeconfig", os.DevNull, "--cache-dir", c.file("cache"),
	}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// binary finds a product of `make build`.
func binary(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "..", ".build", "bin", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	return path
}

// process is a program that is stopped when the test ends.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

func startProcess(t *testing.T, dir, name string, args ...string) *process {
	t.Helper()
	p := &process{name: name, cmd: exec.Command(binary(t, name), args...), done: make(chan struct{}), log: filepath.Join(dir, name+".log")}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.Dir = log, log, dir
	// The programs must not outlive a test that is killed.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // Both are stopped by a signal; what they have to say is in the log.
		log.Close()
		close(p.done)
	}()
	t.Cleanup(func() { p.stop(t) })
	return p
}

func (p *process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) stop(t *testing.T) {
	t.Helper()
	if p.exited() {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return
	case <-time.After(stopTimeout):
	}
	t.Errorf("%s does not stop, killing it", p.name)
	_ = p.cmd.Process.Kill()
	<-p.done
}

// tail returns the end of the log.
func (p *process) tail() string {
	raw, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(raw, []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-20):], []byte("\n")))
}
