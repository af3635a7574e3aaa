# Two commands are enough on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# a process a core with one thread each; a file's tests stay together, as they share what is slow to build
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

.PHONY: system demo page test test-fast check format lint types clean

demo: $(STAMP)
	$(BIN)/diffusion-sae demo

test: $(STAMP) system
	$(PYTEST) --ignore tests/hub/test_interrupted.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/hub/test_interrupted.py  # cut off by the clock: alone

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

# Debian packages of the tests: a real browser, which looks at the pages, and the images the embedded models learned
system:
	@missing=""; \
	command -v chromium >/dev/null || missing="chromium"; \
	[ -d /usr/share/datasets/fashion-mnist ] || missing="$$missing dataset-fashion-mnist"; \
	[ -z "$$missing" ] || { \
	  sudo=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }

# bundles the feature browser's page; node is needed here alone, as what it makes is committed
page:
	cd src/diffusion_sae/report/page && npm ci --no-audit --no-fund && npm run build

# what CI runs: format, lint, types, tests
check: format lint types test

format: $(STAMP)
	$(BIN)/ruff format --check src tests examples benchmarks

lint: $(STAMP)
	$(BIN)/ruff check src tests examples benchmarks

types: $(STAMP)
	$(BIN)/pyright

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build
