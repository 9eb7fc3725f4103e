PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt

.PHONY: demo test test-paper verify

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./demo.sh

# Published numbers that need no training: make verify DATA=ILSVRC2012 [VERIFY="--weights FOLDER --logs FOLDER"]
verify: $(VENV)/.installed
	$(VENV)/bin/python verify.py --data-path "$(DATA)" $(VERIFY)

# Everything but the sweeps, on the newest releases.
test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not sweep"

# The fast set and parity with the original program, on the paper's versions.
test-paper:
	$(MAKE) VENV=.venv-paper REQUIREMENTS=requirements-paper.txt .venv-paper/.installed-dev
	OMP_NUM_THREADS=1 .venv-paper/bin/python -m pytest -q -n 2
	OMP_NUM_THREADS=1 .venv-paper/bin/python -m pytest -q -n 2 -m slow tests/test_parity.py

$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r $(REQUIREMENTS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r $(REQUIREMENTS) -r requirements-dev.txt
	touch $@
