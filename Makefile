# podmig: everything starts here. `make help` is the menu; the logic is in Go below tools/ and cluster-setup/.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PATCHQ := go run ./tools/cmd/patchq
# The patched build: the generated module file points at .build/src, the tag admits the files that name hook symbols.
# The other flags are those of the binaries, so that tests and binaries share compiled packages.
PATCHED := -trimpath -modfile=.build/go.mod -tags=podmig_patched
export CGO_ENABLED := 0

# Packages with tests behind a build tag, found by the tag.
tagged = $(sort $(foreach f,$(shell grep -rlE --include=*_test.go '^//go:build.*\b$(1)\b' cri-api kubelet containerd-cri tools cluster-setup),./$(dir $(f))))

##@ Menu
.PHONY: help
help: ## Show this menu
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*##/ {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Build
# What building, the node image and the local cluster call on the host. Only what is missing is installed.
PACKAGES := ca-certificates gcc git iproute2 iptables kmod libc6-dev libseccomp-dev mmdebstrap nftables pkg-config protobuf-compiler
ONLY ?=

.PHONY: deps
deps: ## Check the Go toolchain, install missing Debian packages
	@command -v go >/dev/null || { echo "no Go toolchain: install Go $$(awk '$$1 == "go" {print $$2}' go.mod) or newer and put it into PATH"; exit 1; }
	@go version >/dev/null 2>&1 || { echo "the Go toolchain is too old for this project:"; GOTOOLCHAIN=local go version; grep '^go ' go.mod; exit 1; }
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "deps: installing" $$missing; mkdir -p .build/log; \
		{ apt-get -o Acquire::Check-Valid-Until=false update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$missing; } \
			>.build/log/deps.log 2>&1 || { tail -n 20 .build/log/deps.log; echo "deps: could not install" $$missing "(as root, on Debian 12 or 13; all of it in .build/log/deps.log)"; exit 1; }; \
	fi

.PHONY: build
build: deps ## Patch and compile everything into .build/bin [ONLY=kubernetes|containerd|podmig|...]
	@go run ./tools/cmd/podmig-build $(if $(ONLY),--only $(ONLY))

.PHONY: assemble
assemble: ## Copy upstream's sources, apply the patch queue, generate code
	@$(PATCHQ) assemble

.PHONY: clean
clean: ## Remove the local cluster and all build products
	@if [ -x .build/bin/localcluster ]; then .build/bin/localcluster down; fi
	@if grep " $(CURDIR)/.build/" /proc/self/mounts; then echo "clean: still mounted, see above: stop what uses it first"; exit 1; fi
	@rm -rf .build

##@ Test
RUN ?=

.PHONY: test lint test-unit test-patched test-upstream test-root e2e e2e-faults
test: lint test-unit generate-check patch-check build test-patched test-upstream test-root e2e e2e-faults ## Everything; what .ci/run calls

lint: ## gofmt and go vet, nothing patched
	@files=$$(gofmt -l cri-api kubelet containerd-cri tools cluster-setup); \
		if [ -n "$$files" ]; then echo "not formatted (gofmt -w):"; echo "$$files"; exit 1; fi
	go vet ./...

test-unit: ## Tests that need no root, no network and nothing patched
	go test ./...

test-patched: assemble ## go vet and tests of our code against the patched sources
	go vet $(PATCHED),root,e2e ./...
	go vet $(PATCHED),podmig_faults ./kubelet/inject ./kubelet/cmd/...
	go test $(PATCHED) ./kubelet/... ./containerd-cri/...

test-upstream: assemble ## Upstream's own tests of every package that a patch names, hooks unset
	go test -trimpath -modfile=.build/go.mod $$($(PATCHQ) tests)

test-root: image ## Tests that need root: real containerd, runc and CRIU; namespaces and control groups
	go test $(PATCHED),root -count=1 -p 1 -timeout 30m $(call tagged,root)

e2e: image ## Move real pods between the nodes of a real cluster: [RUN=TestRedis]
	@# A runtime without the migration service, to see what is said about it.
	@go build -trimpath -o .build/bin/upstream/ github.com/containerd/containerd/v2/cmd/containerd
	go test $(PATCHED),e2e -count=1 -p 1 -timeout 30m $(if $(RUN),-run '$(RUN)' -v) ./cluster-setup/e2e

e2e-faults: image ## Break things while pods move, at each step of a migration: [RUN=FaultCRIU]
	@go run ./tools/cmd/podmig-build --only faults
	go test $(PATCHED),e2e -count=1 -p 1 -timeout 30m $(if $(RUN),-run '$(RUN)' -v) ./cluster-setup/e2e/faults

##@ Generated code of ours
CRI_API := cri-api/migration/v1alpha1
# Not in go.mod: what it needs would move versions that upstream has chosen.
CONTROLLER_GEN := sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0

.PHONY: generate generate-check
generate: deps ## Write the Go code of the CRI extension from its .proto, deep copies and definitions of the objects from their types
	@go build -o .build/tools/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	@PATH="$(CURDIR)/.build/tools:$$PATH" protoc -I $(CRI_API) --go_out=$(CRI_API) --go_opt=paths=source_relative \
		--go-grpc_out=$(CRI_API) --go-grpc_opt=paths=source_relative migration.proto
	@[ -x .build/tools/controller-gen ] && .build/tools/controller-gen --version | grep -q ' $(lastword $(subst @, ,$(CONTROLLER_GEN)))$$' || \
		GOBIN=$(CURDIR)/.build/tools go install $(CONTROLLER_GEN)
	@.build/tools/controller-gen object crd:generateEmbeddedObjectMeta=true paths=./kubelet/apis/... output:crd:dir=cluster-setup/manifests/crds
	@go run ./tools/cmd/crdtrim cluster-setup/manifests/crds/*.yaml

generate-check: generate ## Fail if the committed code is not what its sources give
	@git diff --exit-code --stat -I '^// .*protoc ' -- '$(CRI_API)/*.pb.go' kubelet/apis cluster-setup/manifests/crds || { echo "the generated code is stale: commit what make generate wrote"; exit 1; }

##@ Images and the local cluster (cluster-setup/README.md)
NODES ?= 2

.PHONY: image node-image cluster-up cluster-down
image: build ## What the local cluster needs: the nodes' root file system and the container images
	@.build/bin/nodeimage rootfs
	@.build/bin/mkimage

node-image: build ## The image of a node as a root file system tarball and as an OCI archive
	@.build/bin/nodeimage build

cluster-up: image ## Start a cluster on this machine: [NODES=2]; then .build/bin/localcluster kubectl get nodes
	@.build/bin/localcluster up --nodes $(NODES)

cluster-down: ## Remove the cluster and everything it made
	@.build/bin/localcluster down

##@ See it move
SIZES ?= 0,100,250,500,1000,2500
REPETITIONS ?= 5

.PHONY: demo bench
demo: build ## Start a cluster of two nodes here, move a redis with a million keys, drain its node, show what survived
	@.build/bin/nodeimage rootfs
	@.build/bin/mkimage pause coredns redis controller
	@.build/bin/demo

bench: build ## Time moves beside delete and recreate and beside bare CRIU: [SIZES=0,500] [REPETITIONS=5]
	@.build/bin/nodeimage rootfs
	@.build/bin/mkimage pause coredns ballast
	@go build -trimpath -o .build/bench/ballast ./cluster-setup/images/ballast
	@.build/bin/migration-bench --sizes $(SIZES) --repetitions $(REPETITIONS)

##@ Patch queue (patches/README.md)
UPSTREAM ?=
DIR ?=
need-upstream = $(if $(UPSTREAM),,$(error say which queue: UPSTREAM=kubernetes, containerd or runc))

VERSION ?=

.PHONY: patch-open patch-save patch-refresh patch-check patch-drift
patch-open: ## Open a queue as a git repository: UPSTREAM=kubernetes [DIR=...]
	$(need-upstream)@$(PATCHQ) open $(UPSTREAM) $(if $(DIR),--dir $(DIR))

patch-save: ## Write an opened queue back: UPSTREAM=kubernetes [DIR=...]
	$(need-upstream)@$(PATCHQ) save $(UPSTREAM) $(if $(DIR),--dir $(DIR))

patch-refresh: ## Put hand-edited patches into the queue's format: UPSTREAM=kubernetes
	$(need-upstream)@$(PATCHQ) refresh $(UPSTREAM)

patch-check: ## Lint, apply without offset, round trip, dead patches, unused hooks
	@$(PATCHQ) check

patch-drift: ## How would the queue apply to another version? VERSION=v1.36.3 [UPSTREAM=kubernetes]
	$(if $(VERSION),,$(error say which version: VERSION=v1.36.3))@$(PATCHQ) drift --version $(VERSION) $(if $(UPSTREAM),--upstream $(UPSTREAM))
