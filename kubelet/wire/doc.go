// Package wire is the contract between two kubelets that move a pod: paths,
// bodies, error codes and limits, as they are on the network.
//
// A session is one migration. Its name is the UID of the clone pod. All requests
// but the last go from the target's kubelet to the source's, over HTTPS on the
// kubelet's own port:
//
//	POST   {base}/pods/{source}/sessions/{session}             open: authorise, compare, preflight
//	GET    {base}/pods/{source}/sessions/{session}             status
//	GET    {base}/pods/{source}/sessions/{session}/stream      the checkpoint
//	POST   {base}/pods/{source}/sessions/{session}/freeze      freeze, send the final part
//	POST   {base}/pods/{source}/sessions/{session}/commit      ownership passes to the target
//	POST   {base}/pods/{source}/sessions/{session}/done        the clone runs, stop the source
//	POST   {base}/pods/{source}/sessions/{session}/failed      no restored process exists, the source runs on
//	DELETE {base}/pods/{source}/sessions/{session}             abort before the commit
//	GET    {base}/pods/{clone}/sessions/{session}/outcome      asked by the source's kubelet after a restart or a silence
//
// where {base} is /migration/v1alpha1/namespaces/{namespace}. Every request may be
// repeated; the answer is the same as long as the session lives.
//
// Bodies are JSON, decoded strictly: a field that this version does not have, a
// field named twice and anything after the value are errors. A change of a body is
// therefore a new version in the path. A request with a version that the server
// does not speak is answered with code unknown-version, which lists those it does.
//
// The body of the stream is the runtime's; its version is negotiated in open. It is
// complete when the trailer Podmig-Stream-Bytes arrived and matches.
//
// Every error is one JSON object, Error, with a stable code that decides the HTTP
// status. A client acts on the code only.
//
// The package does no I/O. It proves that messages have one form; that the two
// sides behave is shown by the conformance suite in wiretest, and that the sequence
// of requests is safe by package migration.
package wire
