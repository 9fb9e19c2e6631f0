# podmig: everything starts here. `make help` is the menu; the logic is in Go below tools/ and cluster-setup/.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PATCHQ := go run ./tools/cmd/patchq
# The patched build: the generated module file points at .build/src, the tag admits the files that name hook symbols.
PATCHED := -modfile=.build/go.mod -tags=podmig_patched

##@ Menu
.PHONY: help
help: ## Show this menu
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*##/ {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Build
.PHONY: build
build: ## Patch and compile everything into .build/bin
	@go run ./tools/cmd/podmig-build

.PHONY: assemble
assemble: ## Copy upstream's sources, apply the patch queue, generate code
	@$(PATCHQ) assemble

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
