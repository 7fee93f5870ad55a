# make demo      the main run on the embedded digits, then its summary
# make check     format, lint, types and the fast tests: about a minute on two cores
# make test      the same with all tests
# make docs      the documentation as a site in site/; fails on a broken link
# make lock      renew requirements.lock from pyproject.toml, keeping what still fits
# make upgrade   renew it with the newest versions
# All first make the project's own virtual environment in .venv (make setup).

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Tests compute with one thread each, so two processes share two cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist worksteal
LOCK := python -m uv pip compile --quiet pyproject.toml --all-extras --universal \
	--python-version 3.10 --no-header --no-annotate --no-emit-index-url --no-emit-find-links

.PHONY: check demo docs lint lock setup test upgrade

demo: $(BIN)/.installed
	dvc repro
	@python -m ssnas.report

check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

lint: $(BIN)/.installed
	ruff format --check .
	ruff check .
	mypy

docs: $(BIN)/.installed
	mkdocs build --strict

lock: $(BIN)/.installed
	$(LOCK) -o requirements.lock

upgrade: $(BIN)/.installed
	$(LOCK) --upgrade -o requirements.lock

setup: $(BIN)/.installed

$(BIN)/.installed: requirements.lock
	"$(PYTHON)" -m venv .venv
	python -m pip install --quiet --disable-pip-version-check uv
	python -m uv pip install --quiet --python .venv -r requirements.lock
	touch "$@"
