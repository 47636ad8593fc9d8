# Front door. `make demo` and `make test` work on a fresh machine with Python 3.11 and gcc: they set
# up .venv themselves, once, with the exact versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STUB_GPU ?= .stub-gpu

export HF_HUB_OFFLINE ?= 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION ?= 1
export FLWR_DISABLE_UPDATE_CHECK ?= 1
export FLWR_TELEMETRY_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup setup-hashed demo test test-gpu lint format bench audit clean

setup: $(VENV)/.ready

# torch first and exactly: a range would pull several GB of CUDA packages onto a CPU machine. On a
# GPU machine install the torch build for its driver into .venv before, and it is kept.
$(VENV)/.ready: pyproject.toml constraints.txt text-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps --require-hashes -r text-demo.txt
	touch $@

# The same by content: wheels whose SHA-256 is in constraints-hashed.txt (Linux on x86-64, Python 3.11).
setup-hashed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps --require-hashes -r constraints-hashed.txt -r text-demo.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $(VENV)/.ready

demo: setup
	$(BIN)/rankfit run quickstart run.name=quickstart-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

# On stub GPUs under torch's CUDA build, which is downloaded once (530 MB): tests/stub_gpu/README.md.
test-gpu: setup
	$(BIN)/python tests/stub_gpu/build.py $(STUB_GPU)
	STUB_GPU_HOME=$(abspath $(STUB_GPU)) $(BIN)/python -m tests.stub_gpu.gpu $(STUB_GPU)/state \
		$(abspath $(BIN))/python -m pytest tests/gpu -n 2

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	@ls benchmarks/*.py

# Known flaws in the pinned packages; asks PyPI's advisory service, and
# fails for a package that it could not ask about.
audit:
	test -x .audit/bin/pip-audit || ($(PYTHON) -m venv .audit && .audit/bin/pip install -q pip-audit)
	.audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) $(STUB_GPU) .audit build dist
