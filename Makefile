# Everything lives in .venv; PYTHON may name another interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint benchmarks tables clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rs tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quick ones. Those that need a checkpoint and CIFAR-10, other people's packages or hours: see docs/results.md.
benchmarks: $(READY)
	$(BIN)/python benchmarks/demo.py --record
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/large_layers.py
	$(BIN)/python benchmarks/layers.py --targets onnxruntime --threads 1 --batches 1
	$(BIN)/python benchmarks/networks.py --threads 1 --only resnet18
	$(BIN)/python benchmarks/tables.py

# The tables in README.md and docs/results.md, from the JSON that the benchmarks wrote.
tables: $(READY)
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
