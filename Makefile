# setup: .venv with everything pinned. demo, test, chaos, check, bench: what their names say; each sets up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := data,compare,curate,dashboard,s3,train,eval,dev
# uv does not read pip's configuration; where pip is told of local wheels, so is uv.
FIND_LINKS := $(shell $(PYTHON) -m pip config list 2>/dev/null | sed -n "s/.*find-links=['\"]\{0,1\}\([^'\"]*\).*/--find-links \1/p" | sort -u)
# Every command starts faster from cached bytecode, also where the environment switches the cache off.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-slow chaos check bench clean
setup: $(STAMP)

$(STAMP): setup.cfg constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Phidias needs Python 3.11 or newer; set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
	  $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python $(FIND_LINKS) -c constraints.txt torch==2.13.0 -e '.[$(EXTRAS)]'; \
	else $(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[$(EXTRAS)]'; fi
	touch $@

# The whole way: text of this machine to a pretrained, midtrained, exported model. A second run goes on where the first stopped.
demo: setup
	$(BIN)/python -m data_prep.demo runs/demo_data
	$(BIN)/phidias data run=demo
	$(BIN)/phidias train run=demo
	$(BIN)/phidias export demo prompt="def main("
	$(BIN)/phidias report demo

# Two files at a time, the longest first (tests/conftest.py): a third makes ranks of the others wait for each other. After a
# worker that crashed xdist hands out no more files: it is not started again, so that the run ends.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# With the cases that take minutes each.
test-slow: setup
	PHIDIAS_SLOW=1 $(BIN)/python -m pytest tests/training/test_ranks.py tests/training/test_wandb.py tests/training/test_import.py tests/training/test_downstream.py tests/training/test_tasks.py tests/launcher/test_planner_search.py tests/slurm tests/endtoend

# Faults of every kind at random moments, 200 in all: up to an hour, best on a machine with nothing else to do.
chaos: setup
	$(BIN)/python -m tests.chaos

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

bench: setup
	$(BIN)/python -m benchmarks.cli
	$(BIN)/python -m benchmarks.layouts
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.planner
	$(BIN)/python -m benchmarks.slurm
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.logging
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV)
