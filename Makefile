# make demo   train a small transformer until it groks, take its predictions apart, verify the sum, draw the figures
# make test   lint, format, types and tests
# make fashion   the images of Fashion-MNIST, out of Debian's package, for experiments/pruning and configs/pairs.toml; nothing is installed
# The first two build .venv from constraints.txt first; nothing is needed but Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
FASHION := runs/fashion/usr/share/datasets/fashion-mnist

.PHONY: demo test lint fashion

demo: $(INSTALLED)
	$(BIN)/explaind run configs/quickstart.toml --out runs/quickstart --overwrite

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fashion: $(FASHION)
	@echo 'python experiments/pruning/run.py --source $(FASHION)'

$(FASHION):
	mkdir -p runs/fashion
	cd runs/fashion && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
