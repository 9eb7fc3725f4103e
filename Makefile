PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt

.PHONY: demo test verify

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./demo.sh

# Published numbers that need no training: make verify DATA=ILSVRC2012 [VERIFY="--weights FOLDER --logs FOLDER"]
verify: $(VENV)/.installed
	$(VENV)/bin/python verify.py --data-path "$(DATA)" $(VERIFY)

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r $(REQUIREMENTS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r $(REQUIREMENTS) -r requirements-dev.txt
	touch $@
