# make demo    the main run on the embedded digits, then its summary
# make test    ruff and the tests
# Both first make the project's own virtual environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test setup

demo: $(BIN)/.installed
	dvc repro
	@python -m ssnas.report

test: $(BIN)/.installed
	ruff check .
	ruff format --check .
	python -m pytest

setup: $(BIN)/.installed

$(BIN)/.installed: requirements.lock
	"$(PYTHON)" -m venv .venv
	python -m pip install --quiet --disable-pip-version-check uv
	python -m uv pip install --quiet --python .venv -r requirements.lock
	touch "$@"
