.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1

.PHONY: help install repro test params plan lint smoke bench report pictures playground clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## create .venv with the versions of requirements.lock

# torch first and alone, with its own dependencies; everything else by exact version, without resolving anything.
$(STAMP): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	touch $@

repro: install  ## the main job: data, two ARMs, the sweep, the front, the report
	dvc repro

test: install  ## all tests, offline
	python -m pytest -n auto --dist loadfile

params: install  ## compose conf/ into params.yaml (ARGS="data=own data.path=mine.jsonl" to override)
	python -m pipeline.sweep --cfg job --resolve $(ARGS) > .params.partial && mv .params.partial params.yaml

plan: install  ## memory, forwards, time and judge calls of a run, before anything is loaded (EXPERIMENT=hh_rlhf, ARGS as for params)
	python -m pipeline.sweep --cfg job --resolve $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(ARGS) | python -m pipeline.plan - $(PLAN)

lint: install  ## ruff and mypy
	ruff check . && ruff format --check . && mypy

smoke: install  ## the whole DAG on a tiny random model, in a throw-away copy
	python -m pytest tests/test_dag.py

bench: install  ## speed of guided decoding against the unguided base, and of training against TRL
	python -m tests.bench_decoding
	python -m tests.bench_training
	python -m tests.bench_prepare

report: install  ## where to look at the results; TRACKING=online builds the report in W&B (BASELINE=group to compare with)
	@python -m pipeline.report $(if $(TRACKING),--tracking $(TRACKING)) $(if $(BASELINE),--baseline $(BASELINE))

pictures: install  ## photograph report and playground for the README (needs Chromium)
	python -m tests.pictures

playground: install  ## a local page: sliders for the objectives, the base beside the guided text
	python -m pipeline.playground

clean:  ## remove what stages and tools wrote, but not DVC's cache
	rm -rf models scratch .pytest_cache .mypy_cache .ruff_cache .hypothesis
