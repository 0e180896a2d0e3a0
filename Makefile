PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test together alone gpu docs lint format clean

setup: .venv/ready

# torch comes first and alone, so that no other requirement can pull a different build of it in.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cli,cpu,dev,docs,frameworks]'
	touch $@

demo: setup
	$(BIN)/thinwire demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup
	$(MAKE) -j2 lint together
	$(MAKE) alone

# on two cores two at a time, each with processes of its own; then those that measure time
together: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not alone"

alone: setup
	$(BIN)/python -m pytest -m alone

# on a machine with CUDA, from the checkout as it is: needs torch, pytest, triton and numba, and no network
gpu:
	@PYTHONPATH="$(CURDIR)/src:$(CURDIR)" $(PYTHON) -m benchmarks.gpu $(ARGS)

# into docs/_build; a warning is an error
docs: setup
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo docs/_build .pytest_cache .ruff_cache
