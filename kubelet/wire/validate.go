package wire

// Validate reports what makes an open request unusable.
func (r *OpenRequest) Validate() error {
	switch {
	case !isSubdomain(r.Clone):
		return Errorf(CodeBadRequest, "clone: %q is not the name of a pod", clip(r.Clone))
	case !isUID(r.SourceUID):
		return Errorf(CodeBadRequest, "sourceUID: %q is not the UID of a pod", clip(r.SourceUID))
	case !isSubdomain(r.TargetNode):
		return Errorf(CodeBadRequest, "targetNode: %q is not the name of a node", clip(r.TargetNode))
	case len(r.Containers) == 0:
		return Errorf(CodeBadRequest, "containers: none named")
	}
	names := map[string]bool{}
	for _, c := range r.Containers {
		if !isLabel(c.Name) || names[c.Name] {
			return Errorf(CodeBadRequest, "containers: %q is no name or named twice", clip(c.Name))
		}
		names[c.Name] = true
	}
	if err := validVolumes(r.Volumes); err != nil {
		return err
	}
	return r.Features.Validate()
}

// Validate reports what makes an answer to open unusable.
func (r *OpenResponse) Validate() error {
	switch {
	case r.StreamVersion == 0:
		return Errorf(CodeBadRequest, "streamVersion: 0 is not a version")
	case len(r.Containers) == 0:
		return Errorf(CodeBadRequest, "containers: none named")
	}
	names := map[string]bool{}
	for _, c := range r.Containers {
		if !isLabel(c.Name) || names[c.Name] {
			return Errorf(CodeBadRequest, "containers: %q is no name or named twice", clip(c.Name))
		}
		if c.RestartCount < 0 {
			return Errorf(CodeBadRequest, "containers: %q has a negative count", c.Name)
		}
		names[c.Name] = true
	}
	if err := validVolumes(r.Volumes); err != nil {
		return err
	}
	for _, f := range r.Findings {
		if f.Severity != SeverityWarning && f.Severity != SeverityBlocking {
			return Errorf(CodeBadRequest, "findings: severity %q is unknown", clip(string(f.Severity)))
		}
	}
	return r.Features.Validate()
}

// Validate reports what makes features unusable.
func (f *Features) Validate() error {
	if len(f.StreamVersions) == 0 {
		return Errorf(CodeBadRequest, "features: no stream version named")
	}
	if f.Architecture == "" {
		return Errorf(CodeBadRequest, "features: no architecture named")
	}
	return nil
}

// Validate reports what makes a failure report unusable.
func (r *FailureRequest) Validate() error {
	if r.Reason == "" || !isWord(r.Reason) {
		return Errorf(CodeBadRequest, "reason: %q is not a word in CamelCase", clip(r.Reason))
	}
	return nil
}

// Validate reports what makes a commit unusable.
func (r *CommitRequest) Validate() error {
	if r.ManifestDigest == "" {
		return nil
	}
	if len(r.ManifestDigest) != 64 {
		return Errorf(CodeBadRequest, "manifestDigest: %q is not a SHA-256", clip(r.ManifestDigest))
	}
	for _, c := range []byte(r.ManifestDigest) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Errorf(CodeBadRequest, "manifestDigest: %q is not a SHA-256", clip(r.ManifestDigest))
		}
	}
	return nil
}

// Validate reports what makes an answer to outcome unusable. An outcome that this
// version does not have must not be mistaken for one that it has.
func (r *OutcomeResponse) Validate() error {
	switch r.Outcome {
	case OutcomePending, OutcomeRestored, OutcomeFailed, OutcomeGone:
		return nil
	}
	return Errorf(CodeBadRequest, "outcome: %q is unknown", clip(string(r.Outcome)))
}

// Validate reports what makes an error body unusable.
func (e *Error) Validate() error {
	if e.Code == "" {
		return Errorf(CodeBadRequest, "code: empty")
	}
	return nil
}

func validVolumes(vs []Volume) error {
	names := map[string]bool{}
	for _, v := range vs {
		if !isLabel(v.Name) || names[v.Name] || v.Kind == "" {
			return Errorf(CodeBadRequest, "volumes: %q is no name, named twice or of no kind", clip(v.Name))
		}
		names[v.Name] = true
	}
	return nil
}

// isWord: what Kubernetes takes as the reason of a condition.
func isWord(s string) bool {
	if len(s) > 128 {
		return false
	}
	for i, c := range []byte(s) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return true
}
