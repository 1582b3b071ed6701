# `make demo` and `make test` do all the set-up on a fresh machine; both share one .venv.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python

# make gpu writes its results here, and runs the suite and the part named here (empty: every one)
OUT ?= outputs/gpu
SUITE ?=
PART ?=

.PHONY: demo test bench gpu lint format wheel clean build

demo: build
	$(RUN) -m models.demo --out outputs/demo

test: build
	$(RUN) -m pytest

bench: build
	$(RUN) -m pytest --benchmark

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# The wheel serves every Python >= 3.10 and torch >= 2.11; it is proved in an empty environment.
wheel: build
	rm -rf dist
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	sh tests/smoke_wheel.sh $(PYTHON)

# Uses the machine's own python3 and torch, and needs no network: see benchmarks/gpu.py.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(if $(SUITE),--suite $(SUITE)) $(if $(PART),--part $(PART))

clean:
	rm -rf build dist outputs *.egg-info vidkern/*.so $(VENV)

# ninja rebuilds only what changed under csrc/
build: $(VENV)/installed
	$(RUN) setup.py --quiet build_ext --inplace

$(VENV)/installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77" wheel
	$(PIP) install --quiet -c constraints.txt torch triton ninja "pybind11>=2.13" numpy
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@
