# make demo   paints new identities with the shipped space, into demo/
# make test   ruff, mypy, oxlint and the tests
#
# Both use an environment of their own in .venv, made once and again only when pyproject.toml changes.
# The CPU build of PyTorch suffices; PIP_ARGS="--extra-index-url ..." points pip at it where PyPI has a larger one.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test environment clean

demo: $(VENV)/avatars.stamp
	$(BIN)/w2wpp demo -o demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/oxlint --quiet web/js
	$(BIN)/pytest

environment: $(VENV)/test.stamp

# $* is the extra of pyproject.toml to install: avatars or test.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo build *.egg-info
