# `make` alone lists the commands.
PYTHON ?= python3
# test files that run at a time
JOBS   ?= 2
ENVS   := .envs
BIN    := $(ENVS)/main/bin
PYTEST := $(BIN)/python -m pytest
# Files are assigned whole and in the order of their names: the slow suites come first, the unit tests fill the gaps.
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# The router, the published agent and the aggregator have an environment each: their dependencies conflict with ours.
READY  := $(ENVS)/main/.ready
WRITER := $(ENVS)/main/.docs
ROUTER := $(ENVS)/crossbar/.ready
PEER   := $(ENVS)/socs/.ready
READER := $(ENVS)/aggregator/.ready

.DEFAULT_GOAL := help
.PHONY: help demo run envs check test unit test-docker docs pictures crash fuzz soak bench clean

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) $(ROUTER) ## run the agent with a real router and a simulated SMuRF server, in a scratch folder
	$(BIN)/python -m tests.testbed.demo

run: $(READY) $(ROUTER) ## run router and agent on UDP 8200, database in ./var, until Ctrl-C
	$(BIN)/python -m tests.testbed.foreground

envs: $(READY) $(ROUTER) $(PEER) $(READER) ## install the environments that the tests need (faster: make -j4 envs)

check: $(READY) ## check style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY) $(ROUTER) $(PEER) $(READER) ## run all tests except tests/docker, and check the coverage
	$(BIN)/coverage erase
	$(PYTEST) --ignore=tests/docker -m "not alone" $(SPREAD) --cov --cov-report=
	$(PYTEST) --ignore=tests/docker -m alone --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=90

unit: $(READY) ## run the tests that start no agent
	$(PYTEST) tests/unit $(SPREAD)

test-docker: $(READY) ## build the images, start the compose file, send files through it
	$(PYTEST) tests/docker

docs: $(WRITER) ## build the documentation in build/docs; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs

pictures: $(READY) $(ROUTER) ## redraw the README's pictures of the terminal view, from a real run
	$(BIN)/python -m tests.testbed.pictures

crash: $(READY) $(ROUTER) ## kill it 5,000 times at random moments (100 times in `make test`)
	SOCS_MONITOR_CRASH_ROUNDS=5000 $(PYTEST) --timeout=7200 tests/crash

fuzz: $(READY) ## fuzz the parser and the whole intake for ten minutes
	$(BIN)/python -m tests.fuzz --seconds 600

bench: $(READY) $(ROUTER) $(PEER) ## compare with the bare work and the published agent, and draw the plots
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m bench

soak: $(READY) $(ROUTER) $(PEER) ## run a day's load with the published SupRsync, and kill both at random
	$(BIN)/python -m tests.soak

clean: ## remove the environments, ./build and ./var
	rm -rf $(ENVS) build var

$(READY): pyproject.toml
	$(PYTHON) -m venv $(ENVS)/main
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

$(WRITER): $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[docs]'
	touch $@

$(ENVS)/%/.ready: tests/requirements-%.txt
	$(PYTHON) -m venv $(ENVS)/$*
	$(ENVS)/$*/bin/pip install -q --disable-pip-version-check -r $<
	touch $@
