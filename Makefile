# Two commands are all that is needed: `make demo` and `make test`. Each sets up what is missing, from nothing, on
# Debian 12; what is done already is not done again. DEMO_ARGS and TEST_ARGS are handed on.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DONE := build/done
DEBIAN := libbpf1 libbpf-dev clang-19 iproute2 nginx-light
BPF_SOURCES := $(wildcard src/meshd/bpf/Makefile src/meshd/bpf/*.h src/meshd/bpf/*/*.c src/meshd/bpf/*/*.h)
CFFI := src/hitless/kernel/libbpf_build.py

.PHONY: demo test lint setup clean root requirements
.DELETE_ON_ERROR:

demo: setup
	@$(BIN)/python -m meshd.demo $(DEMO_ARGS)

test: setup lint
	@echo "Running the tests."
	@$(BIN)/python -m pytest --durations=10 $(TEST_ARGS)

lint: setup
	@echo "Looking at the style (ruff) and the types (mypy)."
	@$(BIN)/ruff check .
	@$(BIN)/mypy

setup: root $(DONE)/cffi $(DONE)/bpf

root:
	@[ "$$(id -u)" = 0 ] || { echo "This needs root, to load eBPF programs into a network namespace and a cgroup of its own: run it with sudo." >&2; exit 1; }

$(DONE)/packages: Makefile | root
	@mkdir -p $(DONE)
	@set -eu; missing=; \
	for package in $(DEBIAN); do \
	  [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || missing="$$missing $$package"; \
	done; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3 python3-venv"; \
	if [ -n "$$missing" ]; then \
	  command -v apt-get >/dev/null || { echo "Missing here:$$missing; apt-get is not, so please install them by hand." >&2; exit 1; }; \
	  echo "Installing Debian packages:$$missing."; \
	  policy=/usr/sbin/policy-rc.d; \
	  if [ ! -e $$policy ]; then trap 'rm -f '$$policy EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	  case "$$missing" in *nginx*) systemctl disable --quiet nginx 2>/dev/null || : ;; esac; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is older: name another one with PYTHON=")'
	@touch $@

$(DONE)/venv: requirements.txt pyproject.toml $(wildcard setup.py) $(wildcard $(CFFI)) $(DONE)/packages
	@echo "Making the virtual environment .venv and installing what requirements.txt names, each by its hash."
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(DONE)/cffi: $(wildcard $(CFFI)) $(DONE)/venv
	@echo "Generating the binding to libbpf."
	@[ ! -e $(CFFI) ] || $(BIN)/python $(CFFI)
	@touch $@

$(DONE)/bpf: $(BPF_SOURCES) $(DONE)/packages
	@echo "Compiling meshd's BPF programs."
	@[ ! -e src/meshd/bpf/Makefile ] || $(MAKE) --no-print-directory -s -C src/meshd/bpf
	@touch $@

# Only when a dependency changes; pip-tools need not be in the environment.
requirements:
	@pip-compile --quiet --upgrade --generate-hashes --extra dev --all-build-deps --allow-unsafe --strip-extras \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options -o requirements.txt pyproject.toml

clean:
	@rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	@[ ! -e src/meshd/bpf/Makefile ] || $(MAKE) --no-print-directory -s -C src/meshd/bpf clean
