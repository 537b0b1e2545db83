# The road from a fresh clone: `make demo`. `make help` lists the rest.
#
# Variables:
#   PYTHON       the interpreter that makes the virtual environment (default: python3)
#   PIP_ARGS     passed to every pip, e.g. PIP_ARGS="--extra-index-url URL" to choose where torch comes from
#   PYTEST_ARGS  passed to pytest, e.g. PYTEST_ARGS="-k scheduler -x"
#   BENCH_ARGS   passed to the benchmarks, e.g. BENCH_ARGS="--verb attention --compare build/bench/result.json"

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
MODEL ?= smollm2-135m-instruct
PROMPT ?= What is the capital of France, and what is it famous for?
# The recipe takes it from its environment, as it was typed: neither make nor the shell reads a $ or a quote in it.
override PROMPT := $(value PROMPT)
export PROMPT

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt

# A stamp is an empty file whose time says when its step was last done.
TORCH_STAMP := $(VENV)/.stamp-torch
CLI_STAMP := $(VENV)/.stamp-cli
SERVER_STAMP := $(VENV)/.stamp-server
DEV_STAMP := $(VENV)/.stamp-dev
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.stamp
CSRC := $(shell find csrc -type f -name '*.cpp' -o -type f -name '*.h')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve test test-fast lint format aot-report bench bench-full bench-peers clean distclean preflight

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(CLI_STAMP)  ## Install, fetch the default model, stream an answer
	@$(BIN)/inferneo generate --chat --max-tokens 128 --temperature 0 -- $(MODEL) "$$PROMPT"

serve: $(SERVER_STAMP)  ## Serve the default model at http://localhost:8000 until Ctrl-C
	@$(BIN)/inferneo serve $(MODEL)

test: $(DEV_STAMP)  ## Run every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(DEV_STAMP)  ## Run the tests that need neither the default model nor a GPU compiler
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

lint: $(DEV_STAMP)  ## Check style and types; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(DEV_STAMP)  ## Rewrite the sources into the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

aot-report: $(DEV_STAMP)  ## Compile every GPU kernel for every chip; write benchmarks/results/aot.md (no GPU needed)
	env -u TRITON_INTERPRET $(BIN)/python -m inferneo_kernels.aot --report > benchmarks/results/aot.md.new
	mv benchmarks/results/aot.md.new benchmarks/results/aot.md

bench: $(DEV_STAMP)  ## Time every verb against this machine's roofline (3 minutes); report in build/bench
	$(BIN)/python -m inferneo_benchmarks --output build/bench $(BENCH_ARGS)

bench-full: $(DEV_STAMP)  ## The same for every model, type and shape; report in build/bench-full
	$(BIN)/python -m inferneo_benchmarks --full --output build/bench-full $(BENCH_ARGS)

bench-peers: $(DEV_STAMP) $(PEERS_STAMP)  ## Compare with other engines on the same model file
	$(BIN)/python benchmarks/compare_peers.py --peers-python $(PEERS)/bin/python

# Not all of them install everywhere; the comparison lists those that are missing.
$(PEERS_STAMP): | preflight
	$(PYTHON) -m venv $(PEERS)
	for peer in llama-cpp-python openvino-genai 'torch transformers safetensors' 'onnxruntime-genai onnx onnx-ir'; do \
	  $(PEERS)/bin/pip install $(PIP_ARGS) -c constraints.txt $$peer || true; done
	@touch $@

clean:  ## Remove what was built; keep the virtual environment's packages
	rm -rf build dist *.egg-info inferneo_core/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(CLI_STAMP) $(SERVER_STAMP) $(DEV_STAMP)
	find inferneo_core inferneo kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove the virtual environments too
	rm -rf $(VENV) $(PEERS)

# torch comes first and by itself: the extension is compiled against the one that is installed.
$(TORCH_STAMP): constraints.txt | preflight
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch 'setuptools>=77' wheel ninja
	@touch $@

$(CLI_STAMP): $(TORCH_STAMP) pyproject.toml setup.py $(CSRC)
	$(PIP) --no-build-isolation -e '.[cli]'
	@touch $@

# The package is installed by now, so these add only what the extras name and compile nothing again.
$(SERVER_STAMP): $(CLI_STAMP)
	$(PIP) 'inferneo[server,client]'
	@touch $@

$(DEV_STAMP): $(CLI_STAMP)
	$(PIP) 'inferneo[dev]'
	@touch $@

preflight:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) was not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$($(PYTHON) --version) is too old; Inferneo needs 3.10 or newer. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments. Install its venv module (Debian, Ubuntu: python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "error: $(PYTHON) has no C headers. Install them (Debian, Ubuntu: python3-dev; Fedora: python3-devel)"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "error: no C++ compiler was found. Install one (Debian, Ubuntu: g++; Fedora: gcc-c++) or set CXX"; exit 1; }
