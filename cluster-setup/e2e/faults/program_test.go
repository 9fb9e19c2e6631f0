//go:build e2e

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"podmig.dev/podmig/cluster-setup/cluster"
	"podmig.dev/podmig/cluster-setup/manifests"
	"podmig.dev/podmig/cluster-setup/supervisor"
)

// What the manifests call the controller's namespace, account and lease.
const (
	controllerNamespace = "podmig-system"
	controllerName      = "podmig-controller"
)

// program is podmig-controller. It runs beside the control plane and not in a pod: so it
// leaves nothing on the nodes, and ends and begins when a test says so. It has the rights
// of its manifest.
type program struct {
	hub     supervisor.Client
	command supervisor.Command
	log     string

	// Of the loop that keeps it running.
	signals    chan os.Signal
	stop, done chan struct{}
}

// newProgram installs what the controller needs, without its Deployment, and starts it
// from a folder of binaries.
func newProgram(ctx context.Context, c *cluster.Cluster, bin string) (*program, error) {
	definitions, objects, err := manifests.Controller()
	if err != nil {
		return nil, err
	}
	var kept []string
	for doc := range strings.SplitSeq(string(objects), "\n---\n") {
		if !strings.Contains(doc, "\nkind: Deployment\n") {
			kept = append(kept, doc)
		}
	}
	for _, text := range []string{string(definitions), strings.Join(kept, "\n---\n")} {
		if err := c.Apply(ctx, []byte(text)); err != nil {
			return nil, err
		}
	}
	config := filepath.Join(c.Dir(), controllerName+".conf")
	if err := writeConfig(ctx, config); err != nil {
		return nil, fmt.Errorf("give the controller its kubeconfig: %w", err)
	}
	// Nothing tells when the API server serves them.
	asks, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = poll(asks, "the objects are known", func() error {
		_, err := admin.Dynamic.Resource(migrationResource).List(asks, metav1.ListOptions{})
		return err
	})
	if err != nil {
		return nil, err
	}
	p := &program{
		hub: c.Hub().Supervisor(),
		log: filepath.Join(c.Hub().Logs(), controllerName+".log"),
		command: supervisor.Command{
			Args: []string{filepath.Join(bin, controllerName),
				"--leader-election-namespace=" + controllerNamespace, "--max-migrations=0", "--max-migrations-per-node=0",
				"--metrics-address=0", "--health-address=0"},
			Env: []string{"KUBECONFIG=" + config},
		},
	}
	// Of a run that was interrupted.
	if err := dropLease(ctx); err != nil {
		return nil, err
	}
	p.start()
	return p, nil
}

// writeConfig makes a kubeconfig of the controller's service account.
func writeConfig(ctx context.Context, path string) error {
	day := int64(24 * 60 * 60)
	token, err := admin.Client.CoreV1().ServiceAccounts(controllerNamespace).CreateToken(ctx, controllerName,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &day}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	return clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"c": {Server: admin.Config.Host, CertificateAuthorityData: admin.Config.CAData}},
		AuthInfos:      map[string]*api.AuthInfo{"u": {Token: token.Status.Token}},
		Contexts:       map[string]*api.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, path)
}

// dropLease takes the lease from a controller that was killed, so that its successor need
// not wait for the end of it.
func dropLease(ctx context.Context) error {
	err := admin.Client.CoordinationV1().Leases(controllerNamespace).Delete(ctx, controllerName, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// start lets it run, and run again when it ends by itself, as in a pod.
func (p *program) start() {
	p.signals, p.stop, p.done = make(chan os.Signal), make(chan struct{}), make(chan struct{})
	p.command.Signals = p.signals
	go func() {
		defer close(p.done)
		for {
			p.run()
			select {
			case <-p.stop:
				return
			case <-time.After(time.Second):
			}
		}
	}()
}

func (p *program) run() {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		return
	}
	defer log.Close()
	command := p.command
	command.Stdout, command.Stderr = log, log
	// It ends with the machine at the latest.
	err = p.hub.Run(context.Background(), command)
	fmt.Fprintln(log, "ended:", err)
}

// end returns when it has ended and stays down.
func (p *program) end(signal unix.Signal) {
	close(p.stop)
	select {
	case p.signals <- signal:
		<-p.done
	case <-p.done:
	}
}

// down tells whether somebody has ended it.
func (p *program) down() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

// killController ends the controller at once; it stays down.
func killController(f *fault) error {
	f.later(func() {
		if mover.down() {
			mover.start()
		}
	})
	mover.end(unix.SIGKILL)
	return nil
}

// startController lets it run again, as the successor of one that is known to be dead.
func startController(f *fault) error {
	if err := dropLease(f.ctx); err != nil {
		return err
	}
	return succeedController(f)
}

// succeedController lets it run again; it waits until the lease of the dead one is over.
func succeedController(*fault) error {
	mover.start()
	return nil
}

// poll repeats a question of which nothing tells when its answer changes.
func poll(ctx context.Context, what string, ask func() error) error {
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, errors.Join(ctx.Err(), err))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
