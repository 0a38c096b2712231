# Every target sets itself up: `make demo` on a bare machine creates .venv, installs what is pinned, and runs.
#
#   make demo    train with and without token selection on real text, end with curves and a verdict   DEVICE=cuda for a GPU
#   make smoke   a two-minute version of it
#   make test    all tests
#   make sanitize  the tests of the ops, with the compiled extension under the address and undefined-behaviour sanitizers
#   make test-gpu  what only a GPU can show: builds the kernels with nvcc, runs tests/gpu, also under compute-sanitizer
#   make lint    ruff, mypy, import contracts, spelling, clang-format
#   make bench   measurements, one script of tools/bench_*.py after another
#   make setup   only the set-up
#   make clean   remove caches and build products (not .venv, not runs)

VENV   ?= .venv
DEVICE ?= auto
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.megarpt-installed
TORCH  := torch==2.13.0
EXTRAS := dev,demo,fast,parquet,hf,rl,serve
# Tests start some hundred processes that import the same modules; without bytecode each would compile them anew.
unexport PYTHONDONTWRITEBYTECODE
# Tests over the processors, those of a file together.
SPREAD := -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo smoke test test-gpu sanitize lint bench setup clean
.DEFAULT_GOAL := setup

demo: $(STAMP)
	$(PY) examples/demo/run.py --device $(DEVICE)

smoke: $(STAMP)
	$(PY) examples/demo/run.py --device $(DEVICE) --smoke

test: $(STAMP)
	$(PY) -m pytest --durations=10 $(SPREAD) $(ARGS)

# A copy of the package with an extension of its own, so that the one in the tree stays as it is.
SANITIZED := build/sanitize
sanitize: $(STAMP)
	rm -rf $(SANITIZED)
	MEGARPT_SANITIZE=1 MEGARPT_BUILD=cpu $(PY) setup.py -q build --build-base $(SANITIZED)
	MEGARPT_SANITIZE=1 PYTHONPATH="$$(echo $$PWD/$(SANITIZED)/lib*):$$PWD" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(VENV)/bin/pytest tests/unit/ops tests/parity tests/csrc/test_sanitizer.py $(SPREAD) $(ARGS)

test-gpu: $(STAMP)
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	    "make test-gpu: torch " + torch.__version__ + " sees no NVIDIA GPU here. `make test` runs all that needs none.")'
	MEGARPT_BUILD=cuda $(PY) -m pip install --quiet --progress-bar off --no-deps -e .
	$(PY) -m pytest tests/gpu $(ARGS)
	@if command -v compute-sanitizer >/dev/null; then \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) -m pytest tests/gpu/test_kernels.py; \
	else echo "make test-gpu: compute-sanitizer is not on PATH, memory accesses were not checked" >&2; fi

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/codespell $(wildcard megarpt tools docs examples slurm csrc tests *.md Makefile setup.py)
	@sources=$$(find csrc tests/csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' 2>/dev/null); \
	if [ -n "$$sources" ]; then $(VENV)/bin/clang-format --dry-run -Werror $$sources; fi

bench: $(STAMP)
	@scripts=$$(ls tools/bench_*.py 2>/dev/null); \
	if [ -z "$$scripts" ]; then echo "make bench: tools/ has no bench_*.py" >&2; exit 1; fi; \
	for script in $$scripts; do echo "== $$script"; $(PY) $$script || exit 1; done

setup: $(STAMP)

# torch first and pinned exactly, so that no other requirement can choose another build of it.
$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -type f) | $(PY)
	$(PY) -m pip install --quiet --progress-bar off $(TORCH)
	$(PY) -m pip install --quiet --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# PYTHON=/path/to/python chooses the interpreter; otherwise the first of these that is 3.11 or newer.
$(PY):
	@for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	    echo "megarpt needs Python 3.11 or newer; found: $$("$(or $(PYTHON),python3)" --version 2>&1 || echo none)." >&2; \
	    echo "Install it (Debian and Ubuntu: apt-get install python3.11 python3.11-venv) or say make PYTHON=/path/to/python." >&2; \
	    exit 1; \
	fi; \
	echo "creating $(VENV) with $$($$chosen --version)"; \
	"$$chosen" -m venv $(VENV) || { \
	    rm -f $(PY); \
	    echo "$$chosen cannot make a virtual environment (Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find megarpt tools examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
