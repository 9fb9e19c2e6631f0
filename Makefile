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
.PHONY: assemble
assemble: ## Copy upstream's sources, apply the patch queue, generate code
	@$(PATCHQ) assemble
