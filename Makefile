PYTHON ?= python3
BIN := .venv/bin

# tests that measure no time, and may run beside others
ALONE := compressors kernels wire

.PHONY: setup demo test lint format clean $(ALONE)

setup: .venv/ready

# torch comes first and alone, so that no other requirement can pull a different build of it in.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cli,cpu,dev,frameworks]'
	touch $@

demo: setup
	$(BIN)/thinwire demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup
	$(MAKE) -j2 --output-sync=target lint $(ALONE)
	$(BIN)/python -m pytest $(addprefix --ignore=tests/,$(ALONE))

$(ALONE): setup
	$(BIN)/python -m pytest tests/$@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache
