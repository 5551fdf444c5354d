# `make help` lists the targets. Everything runs in $(VENV), which `make setup` fills; nothing else on the machine is touched.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
MARKERS ?= not slow and not long and not gpu and not slurm
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
PY := $(VENV)/bin/python
GPU_AND_HASHES := $(if $(GPU),--gpu $(if $(filter 0 no,$(GPU)),no,yes)) $(if $(filter 0 no,$(HASHES)),--no-hashes)
SETUP := $(PYTHON) install/setup_env.py --venv $(VENV) $(GPU_AND_HASHES) $(if $(FLASH_ATTN),--flash-attn) $(if $(EXTRAS),--extras $(EXTRAS))
export AUDIT_DB
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-vllm demo less-is-more results fetch test lint docs soak bench-ctc gpu-check scale-check test-slurm lock audit licences clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'
	@echo
	@echo "  PYTHON=python3.12  another interpreter    VENV=/path  another place    GPU=1  CUDA torch though no GPU is seen here"
	@echo "  WORKERS=2  test files at a time (0: one process, for a debugger)"
	@echo "  EXTRAS='av bench demo offload quantization serve stores trackers'  FFmpeg's formats, the comparisons, the web demo, DeepSpeed's Adam on the CPU, a quantised LLM, the server, object stores, W&B and MLflow (with setup)    HASHES=no  packages of a site's own build"
	@echo "  FLASH_ATTN=1  flash-attn too (with setup)    ARGS='...'  arguments for demo, less-is-more, test, soak, bench-ctc, gpu-check, scale-check, test-slurm"

setup: ## fill .venv: packages, CPU or CUDA torch, prebuilt ops; quick when repeated
	@$(SETUP)

setup-dev: # setup, and what tests need
	@$(SETUP) --dev

setup-vllm: ## fill .venv-vllm with vLLM, for `soundwave serve MODEL --backend vllm` (its build for CPUs where no GPU is seen)
	@$(PYTHON) install/setup_vllm.py --venv $(VLLM_VENV) $(GPU_AND_HASHES)

demo: setup ## the whole pipeline on real speech: fetch, pack, stages 1 to 3, scores, one table (2 cores, no GPU)
	@$(PY) -m examples.quickstart.demo $(ARGS)

less-is-more: setup ## the comparisons on the demo's data (ARGS="--seeds 0 --only ours projector" for some of them; hours on 2 cores)
	@$(PY) -m examples.less_is_more.study $(ARGS)

results: setup ## demo, comparisons and trials, their tables put into benchmarks/results, README.md and docs (hours; resumes)
	@$(PY) -m examples.quickstart.demo
	@$(PY) -m examples.less_is_more.study
	@$(PY) -m examples.less_is_more.study --plan examples/less_is_more/trials.yaml
	@$(PY) -m examples.quickstart.results --out benchmarks/results/quickstart.csv
	@$(PY) -m examples.less_is_more.table --out benchmarks/results
	@$(PY) -m examples.less_is_more.table --plan examples/less_is_more/trials.yaml --out benchmarks/results
	@$(PY) -m examples.less_is_more.rare_words --out benchmarks/results/rare_words.csv
	@$(PY) -m docs.generate

fetch: setup ## only download and convert what the demo needs; names the commands for full-scale models
	@$(PY) -m examples.quickstart.fetch $(ARGS)

test: setup-dev ## the fast tests, two-rank ZeRO-3 included (MARKERS='not gpu' for all that a machine without a GPU can run)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(MARKERS)" $(ARGS)

soak: setup-dev ## kill two-rank ZeRO-3 training 30 times over the three stages; the end must equal the undisturbed run's
	@OMP_NUM_THREADS=1 $(PY) -m tests.train.soak $(ARGS)

lint: setup-dev ## format, lint and types of Python, shellcheck, hadolint
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy
	@$(VENV)/bin/hadolint Dockerfile
	@$(VENV)/bin/shellcheck -x $$(git ls-files '*.sh') .ci/run

docs: setup-dev ## check the documentation, and build the site into .cache/site (no network)
	@$(PY) -m docs.check
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)

bench-ctc: setup ## the fused op against the ordinary path, one run
	@$(PY) -m benchmarks.linear_ctc $(ARGS)

scale-check: setup-dev ## the official layout at 9B parameters, full-width models through all stages (24 GB of memory)
	@$(PY) -m benchmarks.scale_check $(ARGS)

gpu-check: setup-dev ## every CUDA parity test and benchmark, the most telling ones first; one JSON, one table; resumes
	@$(PY) -m benchmarks.gpu_check $(ARGS)

test-slurm: setup-dev ## the SLURM scripts on a two-node cluster started on this machine
	@$(PY) -m pytest -m slurm tests/slurm $(ARGS)

lock: ## write install/locks/ from the requirements: versions and sha256 of everything (needs a network)
	@$(PYTHON) install/locks.py lock

audit: ## known vulnerabilities of what is locked (AUDIT_DB=DIR: advisories on this disk, as OSV's JSON files)
	@$(PYTHON) install/locks.py audit

licences: setup-dev ## write docs/licences.md from the packages' own metadata (needs a network)
	@$(PY) install/locks.py licences

clean: ## remove caches of tests and tools (not .venv, not .cache, not runs)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
