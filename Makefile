# `make demo` and `make test` need nothing but Python, pip and make.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
STAMP  := .venv/.steerkit-installed

export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check format docs clean

demo: $(STAMP)
	$(BIN)/steerkit demo --out demo

test: .venv/.dev-installed
	$(BIN)/python -m pytest -n auto --dist loadfile

check: .venv/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

# torch first: whatever build of it is there already (CUDA, ROCm) is kept.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	sed '/^torch==/d' constraints.txt > .venv/constraints.txt
	$(BIN)/python -W ignore -c 'import torch; print("torch==" + torch.__version__)' >> .venv/constraints.txt
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e .
	touch $@

.venv/.dev-installed: $(STAMP)
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
