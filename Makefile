# Every target sets up what it needs: a virtual environment in .venv, installed with the pinned versions of
# constraints/python.txt. Nothing but Python 3.11 or newer, git and make has to be there beforehand.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS := --quiet --disable-pip-version-check --no-input --root-user-action ignore
PINNED := $(PIP_FLAGS) --constraint constraints/python.txt
SETUP := pyproject.toml constraints/python.txt
# Processes that share the suite; each has its own Redis.
WORKERS ?= 2
# Of the whole suite a third is waiting for servers.
WAITERS ?= 3
# What the shorter runs on other Pythons leave out. Every kind of server is still there: in the contract suite.
QUICK := not slow and not crash and not servers
FEW := tests/unit tests/wire tests/cli tests/docs
MOST := tests/unit tests/wire tests/cli tests/contract tests/flows
# Passed on by demo, bench and docs-test: make demo ARGS="--places 1000"
ARGS ?=

.PHONY: help demo test lint faults bench docs-test other-pythons strace redis-tools databases python constraints audit clean

help:
	@echo 'make demo       30,000 places through memory, Redis and SQL, with a kill -9 on the way (takes ARGS=...)'
	@echo 'make test       format, lint, types, import rules, then every test; shorter on other Pythons found here'
	@echo 'make lint       the first part of it'
	@echo 'make docs-test  runs the examples of README.md and docs/'
	@echo 'make faults     the whole fault matrix on three databases, about 15 minutes; writes docs/fault-report.md'
	@echo 'make bench      our figures against their baselines (takes ARGS=...)'
	@echo 'make audit      known vulnerabilities of the pinned versions'
	@echo 'make clean      removes the environments and caches'

demo: .venv/ready-demo
	@$(BIN)/sync-engine demo $(ARGS)

test: lint strace redis-tools databases other-pythons
	@echo '== tests, $(WAITERS) processes'
	@$(BIN)/pytest -n $(WAITERS) --dist worksteal

lint: .venv/ready-dev
	@echo '== ruff format' && $(BIN)/ruff format --check --quiet .
	@echo '== ruff check' && $(BIN)/ruff check --quiet .
	@echo '== mypy --strict' && $(BIN)/mypy --no-error-summary
	@echo '== import rules' && { log=$$($(BIN)/lint-imports --no-cache 2>&1) || { echo "$$log"; exit 1; }; }
	@echo '== longest, to look at (nothing fails here)' && $(BIN)/python tests/test_tidy.py

# Of what keeps no journal, rows 3, 13, 15, 16, 19 and 23 of the matrix: tests/fault_report.py names the files.
faults: .venv/ready-dev strace redis-tools databases
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal --timeout 900 --long --fault-report docs/fault-report.md \
	  tests/crash $$($(BIN)/python tests/fault_report.py) $(ARGS)

docs-test: .venv/ready-dev
	@$(BIN)/pytest tests/docs $(ARGS)

bench: .venv/ready-dev
	@$(BIN)/python -m bench $(ARGS)

audit: .venv/ready-dev
	@$(BIN)/python -m pip install $(PINNED) pip-audit
	@$(BIN)/pip-audit --requirement constraints/python.txt --no-deps --disable-pip

# What does not work on the newest Python fails there; those between get what is about Python itself.
# The same suite without the slow tests and those of crashes and single tiers, on every other supported Python here.
other-pythons: .venv/ready-dev
	@found="$$($(BIN)/python .ci/other_pythons.py)"; \
	test -n "$$found" || echo '== no other supported Python found here'; \
	newest="$${found##*$$'\n'}"; \
	for python in $$found; do \
	  version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  $(MAKE) PYTHON="$$python" ".venv-$$version/ready-test"; \
	  test "$$python" = "$$newest" && some='$(MOST)' || some='$(FEW)'; \
	  echo "== tests $$some on Python $$version, without the slow tests and those of crashes and single tiers"; \
	  ".venv-$$version/bin/python" -m pytest -n $(WORKERS) --dist worksteal -m '$(QUICK)' \
	    --hypothesis-profile quick -p no:cacheprovider $$some; \
	done

# The crash tests stop a process at a chosen system call. They skip themselves where strace cannot be had.
strace:
	@command -v strace >/dev/null || { \
	  echo '== strace is missing: installing it' && \
	  { export DEBIAN_FRONTEND=noninteractive; apt-get install -y -qq strace || { apt-get update -qq && apt-get install -y -qq strace; }; } >/dev/null 2>&1; \
	} || echo '!! NO STRACE, AND IT COULD NOT BE INSTALLED: the crash tests that need it will be skipped'

# The kind `redis-7` of the tests: Debian's Redis, with TLS. redis-tools holds the server too (redis-check-rdb is the
# same executable) and, unlike redis-server, starts no service. Its tests fail, they do not skip, where it is missing.
redis-tools:
	@command -v redis-check-rdb >/dev/null || { \
	  echo '== redis-tools is missing: installing it' && \
	  { export DEBIAN_FRONTEND=noninteractive; apt-get install -y -qq redis-tools || { apt-get update -qq && apt-get install -y -qq redis-tools; }; } >/dev/null 2>&1; \
	} || echo '!! NO REDIS-TOOLS, AND IT COULD NOT BE INSTALLED: the tests that need Redis 7.0, TLS or redis-cli will fail'

# The servers of the SQL tests, as programs alone: no service of theirs is started. Those of mariadb-server-core know
# none; PostgreSQL's package would make a cluster and start it, unless told not to. Their tests fail where they miss.
databases:
	@command -v mariadbd >/dev/null && ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { \
	  echo '== MariaDB or PostgreSQL is missing: installing them' && \
	  export DEBIAN_FRONTEND=noninteractive && \
	  { apt-get install -y -qq --no-install-recommends mariadb-server-core mariadb-client-core postgresql-common \
	    || { apt-get update -qq && apt-get install -y -qq --no-install-recommends mariadb-server-core mariadb-client-core postgresql-common; }; \
	  } >/dev/null 2>&1 && \
	  { ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { \
	    sed -i 's/^#* *create_main_cluster *=.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf && \
	    apt-get install -y -qq --no-install-recommends postgresql; } >/dev/null 2>&1; }; \
	} || echo '!! NO MARIADB OR NO POSTGRESQL, AND THEY COULD NOT BE INSTALLED: the tests that need them will fail'

python:
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'sync-engine needs Python 3.11 or newer with its venv module; name one: make PYTHON=/path/to/python3' >&2; \
	  exit 1; }

# .venv/ready-demo is what users run, .venv/ready-dev adds the tools, .venv-3.12/ready-test has the tests' needs alone.
define install
@folder="$(@D)"; extra="$(subst ready-,,$(@F))"; \
"$$folder/bin/python" -m pip --version >/dev/null 2>&1 || { rm -rf "$$folder"; $(PYTHON) -m venv "$$folder"; }; \
echo "== setting up $$folder for $$extra: $$($$folder/bin/python --version), about half a minute, once"; \
"$$folder/bin/python" -m pip install $(PINNED) hatchling editables; \
"$$folder/bin/python" -m pip install $(PINNED) --no-build-isolation --editable ".[$$extra]"; \
touch "$@"
endef

.venv/ready-%: $(SETUP) | python
	$(install)

.venv-%/ready-test: $(SETUP) | python
	$(install)

# Installs the newest versions of everything into an environment of its own and pins what it got.
constraints: | python
	@rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install $(PIP_FLAGS) hatchling editables
	@.venv-newest/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation --editable '.[dev,uvloop,audit]'
	@{ grep '^#' constraints/python.txt; \
	   { echo 'async-timeout==5.0.1 ; python_full_version < "3.11.3"'; \
	     .venv-newest/bin/python -m pip freeze --exclude-editable --exclude pip \
	       | sed -E ':again; s/^([^=]*)[_.]/\1-/; t again' | tr '[:upper:]' '[:lower:]'; \
	   } | LC_ALL=C sort; \
	 } > .venv-newest/pins && mv .venv-newest/pins constraints/python.txt && rm -rf .venv-newest
	@git diff --stat -- constraints

clean:
	@rm -rf .venv .venv-* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
