# Each target makes its own environment in .venv where there is none.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
OUT ?= demo

.PHONY: demo test test-slow lint notebooks bench clean

demo: $(VENV)/ready
	rm -rf -- "$(OUT)"
	$(RUN) kdlib.cli demo --out "$(OUT)"

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) pytest -m slow

lint: $(VENV)/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .

notebooks: $(VENV)/ready
	$(RUN) ruff format notebooks
	$(VENV)/bin/python tests/refresh.py

bench: $(VENV)/ready
	$(RUN) benchmarks.quality

clean:
	rm -rf -- $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip
	$(RUN) pip install --quiet -c constraints.txt torch
	$(RUN) pip install --quiet -c constraints.txt -e ".[test]"
	$(RUN) pip install --quiet --no-deps --target $(VENV)/clients/2.2.4 kaggle==2.2.4 kagglesdk==0.1.35
	$(RUN) pip install --quiet --no-deps --target $(VENV)/clients/2.2.5 kaggle==2.2.5 kagglesdk==0.1.38
	touch $@
