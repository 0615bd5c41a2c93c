# Two commands are all that is needed: `make demo` and `make test`. Each sets up what is missing, from nothing, on
# Debian 12; what is done already is not done again. DEMO_ARGS and TEST_ARGS are handed on.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DEBIAN := libbpf1 libbpf-dev clang-19 gcc iproute2 nginx-light systemd
BINDING := src/hitless/kernel/_libbpf.py
BPF := $(MAKE) --no-print-directory -s -C src/meshd/bpf

.PHONY: demo cluster adopt test fuzz soak faults bench matrix lint setup clean root packages bpf requirements man dist manifests
.DELETE_ON_ERROR:

demo: setup
	@$(BIN)/python -m meshd.demo $(DEMO_ARGS)

# A cluster in miniature: three nodes, an API server, and rollouts node by node under traffic between them.
cluster: setup
	@$(BIN)/python -m meshd.demo.cluster $(CLUSTER_ARGS)

# A node of Kmesh's kind with 100,000 entries, started by its own loader, adopted and upgraded under traffic; and each kind
# of change that a real daemon's history shows, in small.
adopt: setup
	@$(BIN)/python -m tests.kmesh
	@$(BIN)/python -m tests.catalogue

# Files of tests run side by side in TEST_JOBS processes, each with namespaces of its own.
TEST_JOBS ?= 3
test: setup lint
	@echo "Running the tests."
	@$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --durations=10 $(TEST_ARGS)

# Ten minutes of damaged input for every reader; what it finds it leaves in build/fuzz.
FUZZ_SECONDS ?= 600
fuzz: setup
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# The long runs of tests that make up their cases: PAIRS of structs for the compiler to judge, then UPGRADES of meshd
# under at least OPERATIONS of its clients, then KILLS of an upgrader, then UNDONE upgrades that fail and are taken back.
# Whatever is random begins with SEED. Before that UPGRADES under the eyes of readers, and with a count of what they leave;
# after it meshd is killed for KILL_SECONDS, upgraded all the time and not at all.
PAIRS ?= 2000
SEED ?= 1
UPGRADES ?= 1000
OPERATIONS ?= 2000000
KILLS ?= 100
UNDONE ?= 20
KILL_SECONDS ?= 300
soak: setup
	@HITLESS_ORACLE_PAIRS=$(PAIRS) HITLESS_ORACLE_SEED=$(SEED) $(BIN)/python -m pytest tests/layout/test_compiler_oracle.py
	@HITLESS_UPGRADES=$(UPGRADES) $(BIN)/python -m pytest -s tests/upgrade/test_readers.py tests/upgrade/test_leaks.py \
	  tests/hooks/test_sockets.py
	@HITLESS_EXAMPLES=100 $(BIN)/python -m pytest tests/model/test_real.py
	@$(BIN)/python -m tests.soak --upgrades $(UPGRADES) --operations $(OPERATIONS) --kills $(KILLS) --undone $(UNDONE) \
	  --seed $(SEED) $(SOAK_ARGS)
	@$(BIN)/python -m tests.mesh_kills --seconds $(KILL_SECONDS) --seed $(SEED)
	@$(BIN)/python -m tests.mesh_kills --seconds $(KILL_SECONDS) --seed $(SEED) --releases 4

# An upgrade and its recovery, killed at each of their system calls and with each of them failing, under traffic; DOUBLES
# recoveries are killed too. FAULTS_ARGS are handed on.
DOUBLES ?= 200
faults: setup
	@$(BIN)/python -m tests.faults --doubles $(DOUBLES) --seed $(SEED) $(FAULTS_ARGS)

# How fast a map is copied and what its neighbours notice, beside other ways to do it; wants a quiet machine.
bench: setup
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Kernel tests with each Python and with the newest libbpf here, then on other kernels of Debian's, in virtual machines that
# are emulated, and one table of what came of it: most of an hour. MATRIX_ARGS="--sample" takes three minutes.
MATRIX_DEBIAN := qemu-system-x86 kmod libelf-dev zlib1g-dev debian-archive-keyring
matrix: DEBIAN += $(MATRIX_DEBIAN)
matrix: setup
	@$(BIN)/python -m tests.matrix $(MATRIX_ARGS)

lint: setup
	@echo "Looking at the style (ruff) and the types (mypy)."
	@$(BIN)/ruff check .
	@$(BIN)/mypy

setup: $(BINDING) bpf

root:
	@[ "$$(id -u)" = 0 ] || { echo "This needs root, to load eBPF programs into a network namespace and a cgroup of its own: run it with sudo." >&2; exit 1; }

# apt would start nginx as a service, on port 80 of this machine: a policy forbids that, for this moment only.
packages: root
	@set -eu; missing=; \
	for package in $(DEBIAN); do \
	  [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || missing="$$missing $$package"; \
	done; \
	[ -x $(BIN)/python ] || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3 python3-venv"; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "Missing here:$$missing. There is no apt-get, so please install them by hand." >&2; exit 1; }; \
	echo "Installing Debian packages:$$missing."; \
	policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	case "$$missing" in *nginx*) systemctl disable --quiet nginx 2>/dev/null || : ;; esac

.venv/done: requirements.txt pyproject.toml $(wildcard setup.py) | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is older: name another one with PYTHON=")'
	@echo "Making the virtual environment .venv and installing what requirements.txt names, each by its hash."
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(BINDING): src/hitless/kernel/libbpf_build.py .venv/done
	@echo "Generating the binding to libbpf."
	@$(BIN)/python $<
	@touch $@

# hitless refuses bundles that others can write, which a clone made with umask 002 lets its group do.
bpf: packages
	@$(BPF) -q || { echo "Compiling meshd's BPF programs."; $(BPF); }
	@find src/meshd/bpf -perm /022 -exec chmod go-w {} +

# Man pages and completion of both commands, which the wheel brings along.
man: setup
	@rm -rf packaging/share
	@$(BIN)/python packaging/manual.py packaging/share

# The sdist, and the wheel that is built from it; the same commit gives the same bytes, whoever packs it, where and when.
dist: setup man
	@rm -rf dist && mkdir -p build
	@umask 022; export SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} && \
	$(BIN)/python -m build --no-isolation >build/dist.log 2>&1 || { cat build/dist.log >&2; exit 1; }
	@cd dist && sha256sum *

# Only when the chart changes: what it makes of its own values, for those who have no Helm.
manifests: setup
	@$(BIN)/python packaging/manifests.py

# Only when a dependency changes; pip-tools need not be in the environment.
requirements:
	@pip-compile --quiet --upgrade --generate-hashes --extra dev --all-build-deps --allow-unsafe --strip-extras \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options -o requirements.txt pyproject.toml

clean:
	@rm -rf .venv build dist packaging/share .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info $(BINDING)
	@$(BPF) clean
