# One step for a fresh machine that has only python3, pip and make: `make search` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := .uv/bin/uv
UV_VERSION := 0.13.9
STORAGE ?= runs
SPACE ?= spaces/digits.yaml
ARGS ?=

.PHONY: setup search test slow lint types audit ui pictures bench lock clean

setup: $(VENV)/.installed

# The stamp is newer than what it was made from, so nothing is done when nothing changed.
# uv goes into a folder of its own: a machine without the venv module or with a managed Python has no other place.
$(VENV)/.installed: requirements.lock pyproject.toml
	@start=$$(date +%s); \
	test -x $(UV) || $(PYTHON) -m pip install --quiet --root-user-action=ignore --disable-pip-version-check --target .uv uv==$(UV_VERSION) && \
	{ test -x $(BIN)/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); } && \
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock && \
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable . && \
	touch $@ && echo "set-up took $$(( $$(date +%s) - start )) s"

search: setup
	$(BIN)/python -m search.run $(SPACE) --storage $(STORAGE) $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# AUDIT_STRICT=1: not being able to ask for known vulnerabilities is an error, too.
audit: setup
	$(BIN)/python .ci/audit.py

ui: setup
	$(BIN)/python -m tracking.ui --storage $(STORAGE) $(ARGS)

pictures: setup
	$(BIN)/python docs/pictures.py

bench: setup
	$(BIN)/python -m benchmarks.training_step $(ARGS)

# Versions and hashes only; a uv.lock would also name the registry's hosts.
lock:
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --output-file requirements.lock $(ARGS)

clean:
	rm -rf $(VENV) .uv build *.egg-info
