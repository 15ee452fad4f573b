# One command for each thing a person wants to do; `make` alone lists them.
PYTHON ?= python3
ENVS   := .envs
BIN    := $(ENVS)/main/bin
# an environment each: router, published agent and aggregator bring dependencies that are not ours
READY  := $(ENVS)/main/.ready
WRITER := $(ENVS)/main/.docs
ROUTER := $(ENVS)/crossbar/.ready
PEER   := $(ENVS)/socs/.ready
READER := $(ENVS)/aggregator/.ready

.DEFAULT_GOAL := help
.PHONY: help demo run envs check test unit test-docker docs pictures crash fuzz soak bench clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) $(ROUTER) ## a real router, the real agent and an emulated SMuRF server, in a scratch folder
	$(BIN)/python -m tests.testbed.demo

run: $(READY) $(ROUTER) ## router and agent in the foreground on UDP 8200, database under ./var, until Ctrl-C
	$(BIN)/python -m tests.testbed.foreground

envs: $(READY) $(ROUTER) $(PEER) $(READER) ## all environments that the tests need; make -j4 envs is faster

check: $(READY) ## what CI checks besides the tests: style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY) $(ROUTER) $(PEER) $(READER) ## all tests, with the package's coverage
	$(BIN)/coverage erase
	$(BIN)/python -m pytest --ignore=tests/docker --cov --cov-report=term:skip-covered --cov-fail-under=90

unit: $(READY) ## the tests that need no other process
	$(BIN)/python -m pytest tests/unit

test-docker: $(READY) ## build the images, bring compose up, send files through it
	$(BIN)/python -m pytest tests/docker

docs: $(WRITER) ## the documentation, into build/docs; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs

pictures: $(READY) $(ROUTER) ## draw the README's pictures of the terminal view anew, from a real run
	$(BIN)/python -m tests.testbed.pictures

crash: $(READY) $(ROUTER) ## kill it at more moments than CI has time for
	SOCS_MONITOR_CRASH_ROUNDS=5000 $(BIN)/python -m pytest --timeout=7200 tests/crash

fuzz: $(READY) ## ten minutes of anything at all on the parser and the whole intake
	$(BIN)/python -m tests.fuzz --seconds 600

bench: $(READY) $(ROUTER) $(PEER) ## this agent beside the bare work and the published agent; draws the plots
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m bench

soak: $(READY) $(ROUTER) $(PEER) ## a day's load with the published SupRsync, and random kills of both
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
