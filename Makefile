# Each target makes the virtual environment it needs; all that must be there is make, Python >= 3.10 and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

# Windows keeps a virtual environment's programs elsewhere.
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := $(VENV)/installed
# The machine code of solves, which an install compiles.
CODE := neml2_aoti_plugin/_solve/machine_code.bc
SOURCES := $(wildcard machine/*.py) $(addprefix neml2_aoti_plugin/_solve/,criteria.py tables.py)
READY := $(INSTALLED) $(CODE)
# What pytest runs by itself: without what needs other stubs, releases or packages, or takes minutes.
PLAIN := not long and not legacy and not wide and not clients

.PHONY: help machine-code demo calibrate plate test test-processes test-wide coverage long legacy legacy-all test-clients lint format docs docs-links wheel clean compare-native benchmark benchmark-check benchmark-service torch-matrix lowest

help:
	@echo "make demo    compile the viscoplastic model, run it, and draw its stress-strain curve"
	@echo "make calibrate  fit two parameters of the compiled viscoplastic model to noisy data, and draw it"
	@echo "make plate   pull a plate with a hole by finite elements around compiled integration points, and draw it"
	@echo "make test    run the tests; from a cold cache it compiles the stubs they need first"
	@echo "make test-processes  run the tests that start interpreters, services and browsers, and what pages show"
	@echo "make test-wide  run the tests that need the other stubs, which take minutes more to compile, and slow ones"
	@echo "make coverage  tell which lines of the package the two suites before run"
	@echo "make long    run the long tests: many threads, processes and damaged files"
	@echo "make legacy  run the tests on an artifact of each older schema, which it compiles first"
	@echo "make legacy-all  run the tests on all artifacts of older neml2 releases; half an hour of compiling more"
	@echo "make test-clients  run programs of others around compiled models: felupe, torch-fem, JAX, pyzag; it installs them"
	@echo "make lint    check style, format and types"
	@echo "make format  mend style and format where a tool can"
	@echo "make docs    build the documentation in build/docs; a warning or a broken link within it is an error"
	@echo "make docs-links  try the links that lead out of the documentation, which takes the network"
	@echo "make machine-code  compile the machine code of solves again, after a change of its sources"
	@echo "make wheel   build the wheel in dist/"
	@echo "make compare-native  compare lockstep mode with neml2's C++ binding; writes docs/lockstep.md"
	@echo "make benchmark    measure against neml2's C++ runtime and others, for an hour; writes docs/performance.md"
	@echo "make benchmark-check    tell in minutes what has become slower since benchmarks/reference.json was written"
	@echo "make benchmark-service    load the service with requests, for some minutes; writes its part of docs/service.md"
	@echo "make lowest  test the service and the reading of artifacts with the lowest releases that pyproject.toml allows"
	@echo "make torch-matrix    test under several torch releases and cross-load; hours, 40 GB; writes docs/compatibility.md"
	@echo "make clean   remove the virtual environment and what was built"

# torch comes first and by itself: resolved together with the rest, pip may look at every release of it. Dependency
# groups are known to pip from 25.1 on.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dask,serve]' --group dev
	@touch $@

$(CODE): $(SOURCES) | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

machine-code: $(CODE)

demo: $(READY)
	$(BIN)/python examples/demo.py

calibrate: $(READY)
	$(BIN)/python examples/calibrate.py

plate: $(READY)
	$(BIN)/python examples/plate.py

test: $(READY)
	$(BIN)/python -m stubs.build --jobs $(JOBS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m '$(PLAIN) and not processes' $(PYTEST_ARGS)

test-processes: $(READY)
	$(BIN)/python -m stubs.build --jobs $(JOBS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m '$(PLAIN) and processes' $(PYTEST_ARGS)

test-wide: $(READY)
	$(BIN)/python -m stubs.build --all --jobs $(JOBS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m 'wide and not long and not legacy' $(PYTEST_ARGS)

# The loops that are compiled beforehand are not counted.
coverage: $(READY)
	$(BIN)/python -m stubs.build --jobs $(JOBS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --cov=neml2_aoti_plugin $(PYTEST_ARGS)

long: $(READY)
	$(BIN)/python -m stubs.build --all --jobs $(JOBS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m long --timeout 2000 $(PYTEST_ARGS)

# One scenario, which has explicit and implicit segments, a predictor, derivatives and a driver, by each release.
legacy: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m legacy -k multi --timeout 3600 $(PYTEST_ARGS)

legacy-all: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m legacy --timeout 3600 $(PYTEST_ARGS)

# The packages of others are large, and come into the environment here.
test-clients: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group clients
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m clients $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# DOCS_FLAGS="-t online" adds links into the documentation of Python, NumPy, torch and neml2.
docs: $(READY)
	$(BIN)/python -m sphinx --fresh-env -q -W --keep-going -c docs $(DOCS_FLAGS) . build/docs
	@echo "The documentation is build/docs/docs/index.html."

docs-links: $(INSTALLED)
	$(BIN)/python -m sphinx -q -c docs -t online -b linkcheck . build/docs-links

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -m pytest --quiet tests/test_package.py -k wheel

clean:
	rm -rf $(VENV) $(CODE) dist build .mypy_cache .pytest_cache .ruff_cache

# Lockstep mode against neml2's C++ binding, in an environment of its own with the last torch that the binding runs on.
compare-native: $(READY)
	$(BIN)/python tools/compare_native.py --compile-with $(BIN)/python

# Times and memory, in the same environment. BENCHMARK_ARGS="--quick" tries it in minutes; "--help" tells the rest.
benchmark: $(READY)
	$(BIN)/python -m benchmarks $(BENCHMARK_ARGS)

# The ratios to the C++ runtime on few rows beside the stored ones. BENCHMARK_ARGS="--write-reference" with "make
# benchmark", or with --quick, stores new ones.
benchmark-check: $(READY)
	$(BIN)/python -m benchmarks --check $(BENCHMARK_ARGS)

# The service under load, by wrk, and a long run whose answers are compared; writes its part of docs/service.md.
benchmark-service: $(READY)
	$(BIN)/python -m benchmarks.service $(BENCHMARK_ARGS)

# The wheel under several releases of torch, each in an environment of its own. TORCHES="2.14.1 2.15.0" takes these alone.
# MATRIX_ARGS="--pythons python3.12 python3.13" runs the tests under these Pythons instead.
torch-matrix: $(READY)
	$(BIN)/python -m tools.torch_matrix --jobs $(JOBS) $(MATRIX_ARGS) $(TORCHES)

# The service and the reading of artifacts with the lowest releases of what they are made of, in the environment build/lowest.
lowest: $(READY)
	$(BIN)/python -m stubs.build --jobs $(JOBS)
	$(BIN)/python -m tools.lowest $(PYTEST_ARGS)
