// Package checkpoint is kubectl's plugin checkpoint: it has the kubelet of a running pod
// take a checkpoint of the whole pod, which runs on, and downloads it.
//
// The file has everything that the pod has in memory, so it is made for its owner only.
// It gets its name when all of it has arrived and every digest in it is right; until then
// it is a temporary file, which goes whatever happens.
//
// The tests run the plugin against an API server of their own; that a real pod is in the
// file, and runs on, is shown by the end-to-end tests.
package checkpoint

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"podmig.dev/podmig/kubelet/wire"
)

// RefusedError is a checkpoint that was not begun: the pod was not touched.
type RefusedError struct{ Message string }

func (e *RefusedError) Error() string { return e.Message }

// ExitCode is what a program ends with after an error of the command, part of its
// interface: 0 without one, 3 when the checkpoint was refused, 1 after any other.
func ExitCode(err error) int {
	var refused *RefusedError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &refused):
		return 3
	}
	return 1
}

type options struct {
	config      *genericclioptions.ConfigFlags
	out, errOut io.Writer
	pod, path   string
	force       bool
	output      string
	now         func() time.Time
}

// Command returns the plugin's command. What it prints about progress goes to errOut.
func Command(out, errOut io.Writer) *cobra.Command {
	o := &options{config: genericclioptions.NewConfigFlags(true), out: out, errOut: errOut, now: time.Now}
	cmd := &cobra.Command{
		Use:         "kubectl-checkpoint POD PATH",
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl checkpoint"},
		Short:       "Download a checkpoint of a running pod, which runs on",
		Long: `Download a checkpoint of a running pod: the memory, processes, open files, writable layers and emptyDir volumes of its
containers at one instant. The pod stands still while the checkpoint is written on its node, and runs on before the
download begins.

PATH is the file, or a directory, in which the file is called POD-TIME.tar. The file has every secret that the pod has in
memory; it can be read by you only. It appears when it is complete and its digests are right. It needs the right to create
nodes/proxy, which administrators have.

Exit codes: 0 the file is there, 3 the checkpoint was refused and the pod was not touched, 1 any other error.`,
		Example: `  kubectl checkpoint redis redis.tar
  kubectl checkpoint redis backups/ -n shop   # backups/redis-20261121T190331Z.tar
  kubectl checkpoint redis redis.tar --force -o json`,
		Args:              o.arguments,
		ValidArgsFunction: o.completeArguments,
		SilenceUsage:      true,
		SilenceErrors:     true,
		RunE:              func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	o.config.AddFlags(cmd.Flags())
	cmd.Flags().BoolVar(&o.force, "force", false, "replace a file that exists")
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "output format: json, or nothing for the path alone")
	o.completeFlags(cmd)
	return cmd
}

func (o *options) arguments(cmd *cobra.Command, args []string) error {
	if err := cobra.ExactArgs(2)(cmd, args); err != nil {
		return fmt.Errorf("%w: name a pod and a file, kubectl checkpoint POD PATH", err)
	}
	o.pod, o.path = args[0], args[1]
	return nil
}

// report is what -o json prints.
type report struct {
	Path       string   `json:"path"`
	Bytes      int64    `json:"bytes"`
	Containers []string `json:"containers"`
	Node       string   `json:"node"`
	// Digest is the SHA-256 of the file.
	Digest string `json:"digest"`
}

func (o *options) run(ctx context.Context) error {
	switch {
	case o.output != "" && o.output != "json":
		return fmt.Errorf("--output is %q: give json or nothing", o.output)
	case o.path == "":
		return errors.New("the path is empty: name a file or a directory")
	}
	path, err := place(o.path, o.pod, o.now())
	if err != nil {
		return err
	}
	if err := vacant(path, o.force); err != nil {
		return err
	}
	cfg, err := o.config.ToRESTConfig()
	if err != nil {
		return err
	}
	namespace, _, err := o.config.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return err
	}
	c, err := corev1client.NewForConfig(cfg)
	if err != nil {
		return err
	}
	pod, err := c.Pods(namespace).Get(ctx, o.pod, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), apierrors.IsForbidden(err):
		return &RefusedError{err.Error()}
	case err != nil:
		return err
	case pod.Spec.NodeName == "":
		return &RefusedError{fmt.Sprintf("pod %s is on no node yet: wait until it runs", o.pod)}
	}
	got, err := o.fetch(ctx, cfg, c, pod, path)
	if err != nil {
		return err
	}
	if o.output == "json" {
		e := json.NewEncoder(o.out)
		e.SetIndent("", "  ")
		return e.Encode(report{Path: path, Bytes: got.bytes, Containers: got.containers, Node: pod.Spec.NodeName, Digest: "sha256:" + got.digest})
	}
	_, err = fmt.Fprintln(o.out, path)
	return err
}

// place is the file that a path means.
func place(path, pod string, now time.Time) (string, error) {
	st, err := os.Stat(path)
	switch {
	case err == nil && st.IsDir():
		return filepath.Join(path, pod+"-"+now.UTC().Format("20060102T150405Z")+".tar"), nil
	case err == nil:
		return path, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", err
	case os.IsPathSeparator(path[len(path)-1]):
		return "", fmt.Errorf("there is no directory %s: make it first", path)
	}
	dir := filepath.Dir(path)
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return "", fmt.Errorf("there is no directory %s: make it first", dir)
	}
	return path, nil
}

// vacant refuses what must not be replaced, before the pod is frozen for nothing.
func vacant(path string, force bool) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file: name another one", path)
	case !force:
		return exists(path)
	}
	return nil
}

func exists(path string) error {
	return fmt.Errorf("%s exists: name another file, or give --force to replace it", path)
}

// fetch downloads the checkpoint of a pod and gives it its name.
func (o *options) fetch(ctx context.Context, cfg *rest.Config, c *corev1client.CoreV1Client, pod *corev1.Pod, path string) (content, error) {
	// For its owner only, and beside the place where it will be: a rename is no copy.
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return content{}, err
	}
	defer func() {
		f.Close()
		// After the rename there is nothing of this name.
		_ = os.Remove(f.Name())
	}()
	fmt.Fprintf(o.errOut, "pod %s on node %s is being checkpointed\n", pod.Name, pod.Spec.NodeName)
	body, length, err := request(ctx, cfg, c, pod)
	if err != nil {
		return content{}, err
	}
	defer body.Close()
	fmt.Fprintf(o.errOut, "the pod runs on, its checkpoint of %s is being received\n", size(length))
	p := &progress{out: o.errOut, total: length, began: time.Now()}
	n, err := io.Copy(io.MultiWriter(f, p), body)
	if err == nil && n != length {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return content{}, fmt.Errorf("after %d of %d bytes of the checkpoint: %w", n, length, cmp.Or(context.Cause(ctx), err))
	}
	p.print()
	if err := f.Sync(); err != nil {
		return content{}, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return content{}, err
	}
	got, err := verify(f)
	if err != nil {
		return content{}, fmt.Errorf("what was received is no checkpoint, take another one: %w", err)
	}
	return got, name(f.Name(), path, o.force)
}

// name gives a file its place.
func name(file, path string, force bool) error {
	if force {
		return os.Rename(file, path)
	}
	// Unlike a rename, a link replaces nothing that came meanwhile.
	err := os.Link(file, path)
	if errors.Is(err, fs.ErrExist) {
		return exists(path)
	}
	if err != nil {
		// Not every file system has links.
		if err := vacant(path, false); err != nil {
			return err
		}
		return os.Rename(file, path)
	}
	return nil
}

// request asks the kubelet of a pod for its checkpoint, through the API server.
func request(ctx context.Context, cfg *rest.Config, c *corev1client.CoreV1Client, pod *corev1.Pod) (io.ReadCloser, int64, error) {
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, 0, err
	}
	u := c.RESTClient().Post().Resource("nodes").Name(pod.Spec.NodeName).SubResource("proxy").
		Suffix(wire.PodCheckpoints, pod.Namespace, pod.Name).URL()
	// Not by the REST client, which asks again when it thinks it should.
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), http.NoBody)
	if err != nil {
		return nil, 0, err
	}
	resp, err := client.Do(r)
	if err != nil {
		return nil, 0, cmp.Or(context.Cause(ctx), err)
	}
	if resp.StatusCode == http.StatusOK && resp.ContentLength > 0 {
		return resp.Body, resp.ContentLength, nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxBody))
	if err != nil {
		return nil, 0, err
	}
	return nil, 0, refusal(resp.StatusCode, b, pod.Spec.NodeName)
}

// refusal is what an answer that is no checkpoint says: the kubelet's words, or the API
// server's.
func refusal(code int, body []byte, node string) error {
	var e wire.Error
	if err := wire.Unmarshal(body, &e); err == nil && e.Code != "" {
		text := wire.Sentence(e.Message, e.Cure)
		switch e.Code {
		case wire.CodeRuntime, wire.CodeDeadline, wire.CodeAborted, wire.CodeInternal:
			return fmt.Errorf("node %s: %s", node, text)
		}
		return &RefusedError{text}
	}
	var s metav1.Status
	if err := json.Unmarshal(body, &s); err == nil && s.Kind == "Status" && s.Message != "" {
		if code >= 400 && code < 500 {
			return &RefusedError{s.Message}
		}
		return errors.New(s.Message)
	}
	text := strings.TrimSpace(string(body))
	switch code {
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		return &RefusedError{fmt.Sprintf("node %s serves no checkpoints of pods: run a kubelet with podmig there and switch the feature gate PodMigration on", node)}
	case http.StatusForbidden:
		// The API server has let the user pass and may not go on itself.
		return &RefusedError{fmt.Sprintf("the kubelet of node %s does not allow the API server to take checkpoints, grant its user nodes/checkpoint: %s", node, text)}
	}
	return fmt.Errorf("node %s answered with status %d: %.300s", node, code, text)
}
