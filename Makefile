# Each target sets up all it needs in .venv: Python 3.11 or newer and git are enough to begin with.
#
#     make demo     an application loses its machine, and gets its database back
#     make test     all tests, with real MinIO, SeaweedFS and Litestream
#     make bench    measure, beside plain apsw and Litestream
#     make simulate play the engine under seeded chaos, and say how much of it ran
#     make soak     lose a thousand machines, and count what is missing
#     make lint     style, types, layers, spelling
#     make docs     the pages as a site, in build/site
#     make clean    remove what the others made
#
# ARGS goes to the program behind a target: make test ARGS="-k restore".

VENV = .venv
PYTHON ?=
ARGS =
TEST_WORKERS = 2

.PHONY: help demo test bench simulate soak lint docs clean project dev

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^VENV/,$$d'

project:
	@PYTHON="$(PYTHON)" .ci/environment $(VENV)

dev:
	@PYTHON="$(PYTHON)" .ci/environment $(VENV) dev

demo: project
	@$(VENV)/bin/python examples/demo.py $(ARGS)

test: dev
	@$(VENV)/bin/python tests/support/servers.py || [ "$$CI" != true ]
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) $(ARGS)

bench: dev
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

simulate: ARGS = 0 499 --coverage
simulate: dev
	cd tests && ../$(VENV)/bin/python -m simulation $(ARGS)

soak: dev
	$(VENV)/bin/python tests/support/losing.py $(ARGS)

lint: dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

docs: dev
	$(VENV)/bin/python tests/support/cli_reference.py
	$(VENV)/bin/mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) build dist src/walship.egg-info demo-data .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
