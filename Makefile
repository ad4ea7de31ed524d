# Two commands: `make demo` and `make test`. Both make .venv on first use; only python3 (3.11 or newer) and a package index are needed.
PYTHON ?= python3
BIN    := .venv/bin

.PHONY: demo test notebooks clean
.DELETE_ON_ERROR:

demo: .venv/.base
	$(BIN)/tsd demo

test: .venv/.dev
	$(BIN)/python tests/notebooks.py check
	timeout 1500 $(BIN)/python tests/notebooks.py test
	timeout 1200 $(BIN)/python -m pytest tests

# export, execute and clean every notebook, then render README.md: what to do after editing them
notebooks: .venv/.dev
	$(BIN)/nbdev_export
	$(BIN)/python tests/notebooks.py run $$(find nbs -name '*.ipynb' -not -path '*checkpoints*' | sort)
	$(BIN)/python tests/notebooks.py readme

.venv/.uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	touch $@

.venv/.base: .venv/.uv settings.ini setup.py requirements.lock
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c requirements.lock -e .
	touch $@

.venv/.dev: .venv/.uv settings.ini setup.py requirements.lock
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c requirements.lock -e '.[dev]'
	touch $@ .venv/.base

clean:
	rm -rf .venv build dist *.egg-info
