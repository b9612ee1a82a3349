# make demo: the main job on the embedded default.  make test: the tests.  Both need only Python 3.11.
SHELL := /bin/bash
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := $(VENV)/.ready
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint docs audit clean

demo: $(READY)
	$(VENV)/bin/flashdmd demo --output-dir runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/flashdmd config schema > docs/recipe.schema.json
	$(VENV)/bin/flashdmd config keys > docs/recipe.md
# Known vulnerabilities of the pinned packages; needs the network. What docs/security.md explains passes.
audit:
	test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip install --quiet pip-audit==2.10.1; }
	.audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt -r requirements-quant.txt \
		$$(sed -n 's/^| \(\(CVE\|PYSEC\|GHSA\)-[^ ]*\) .*/--ignore-vuln \1/p' docs/security.md)

clean:
	rm -rf $(VENV) .audit runs/demo .pytest_cache .ruff_cache .mypy_cache

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another with make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
