# make run | test | lint | docs | bench | notebooks | glue | clean. The environment in .venv is made once, and again when a pinned version changes.

PYTHON ?= python3
BIN := .venv/bin
# laplace-torch and what it imports; torchvision, which it asks for and does not import, fits one build of torch only
LAPLACE := laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops linear_operator unfoldNd
INSTALLED := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

unexport PYTHONDONTWRITEBYTECODE# or every process compiles five thousand modules again, for seven seconds
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000# OpenMP's threads sleep soon, so that processes can share the machine: docs/how-to/scaling.md
endif

.PHONY: run test lint docs bench notebooks glue clean

run: $(INSTALLED)
	$(BIN)/pyro-blora train --preset demo --if_finished show

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/: it loads nothing from elsewhere. `.venv/bin/mkdocs serve` shows it, with its search, while you write.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python experiments/benchmark.py

# Executes the scripts of analysis/ into notebooks with tables and pictures: the script is the source, the notebook its copy.
notebooks: $(INSTALLED)
	$(BIN)/python experiments/notebooks.py

# GLUE on DeBERTaV3-base, which takes a GPU and a network: 200 runs, resumed by the same command. Runs that failed are listed.
glue: $(INSTALLED)
	-$(BIN)/python experiments/grid.py experiments/grids/deberta_glue.yaml $(if $(GLUE_DIR),--glue_dir $(GLUE_DIR))
	$(BIN)/python experiments/glue_table.py runs/deberta_glue/results.parquet --table benchmarks/deberta_glue.md

# The stamp's name holds a checksum of both files: a fresh checkout of the same versions reuses the environment.
# torch goes first and alone, so that a build of your choice that is installed already (CUDA, ROCm) is kept if it fits.
# A recent pip takes half the time of the one that comes with Python 3.11.
# Of 20,000 modules the first import compiles the third that is used; pip would compile all of them, half a minute.
$(INSTALLED):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[demo,dev,docs,cluster]'
	$(BIN)/python -m pip install --no-compile -c constraints.txt --no-deps $(LAPLACE)
	rm -f .venv/.installed-*
	touch $@

# Results in runs/ stay, and so does .venv: remove it by hand to make it anew.
clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find pyro_blora tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
