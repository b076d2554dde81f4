# Each target makes its own environment in .venv where there is none.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
OUT ?= demo
NEW := python_version >= '3.11'
# what Kaggle's client wants; without it the tests of kaggle/ are skipped

.PHONY: demo test test-slow lint notebooks docs bench-quality clean

demo: $(VENV)/ready
	rm -rf -- "$(OUT)"
	$(RUN) kdlib.cli demo --out "$(OUT)"

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/ready $(VENV)/eval/ready
	OMP_NUM_THREADS=1 $(RUN) pytest -m slow

lint: $(VENV)/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .

notebooks: $(VENV)/ready
	$(RUN) ruff format notebooks
	$(VENV)/bin/python tests/refresh.py

# the website, in site/
docs: $(VENV)/docs/ready
	$(VENV)/docs/bin/python -m docs.configuration
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

# hours on one core; a run that is in benchmarks/results/quality.jsonl is not made again
bench-quality: $(VENV)/ready
	OMP_NUM_THREADS=1 nice -n 10 $(RUN) benchmarks.quality

clean:
	rm -rf -- $(VENV) demo site build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip
	$(RUN) pip install --quiet -c constraints.txt torch
	$(RUN) pip install --quiet -c constraints.txt -e ".[test]"
	$(RUN) pip install --quiet --no-deps --target $(VENV)/clients/2.2.4 "kaggle==2.2.4; $(NEW)" "kagglesdk==0.1.35; $(NEW)"
	$(RUN) pip install --quiet --no-deps --target $(VENV)/clients/2.2.5 "kaggle==2.2.5; $(NEW)" "kagglesdk==0.1.38; $(NEW)"
	touch $@

# For lm-eval on exported students: an environment of its own, on top of the first.
$(VENV)/eval/ready: $(VENV)/ready
	$(PYTHON) -m venv $(VENV)/eval
	$(RUN) site | sed -n "s/^ *'\(.*site-packages\)',$$/\1/p" | head -1 > $(VENV)/first.pth
	mv $(VENV)/first.pth $$($(VENV)/eval/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	$(VENV)/eval/bin/python -m pip install --quiet lm-eval==0.4.13
	touch $@

# For the website: an environment of its own, without torch. The page of keys needs nothing but the standard library.
$(VENV)/docs/ready:
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet mkdocs-material==9.8.2
	touch $@
