# Everything runs in .venv, which the first target makes and fills; `make` alone lists the targets.
#
# PYTHON=python3.13   the interpreter of .venv; else the first that is new enough
# EXTRAS=cuda         or tpu: also installs JAX for that device
# RUN=runs/again      the folder of the quickstart
# ARGS="-k sharding"  what pytest is told besides
# JOBS=4              processes of the tests

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?=
RUN ?= runs/quickstart
ARGS ?=
JOBS ?= 2

space := $(subst ,, )
comma := ,
# .installed, .installed-test, .installed-cuda, .installed-test-cuda, ...: empty files that say what
# .venv holds already.
BASE := $(VENV)/.installed$(subst $(space),,$(addprefix -,$(EXTRAS)))
TEST := $(VENV)/.installed-test$(subst $(space),,$(addprefix -,$(EXTRAS)))
list = $(subst $(space),$(comma),$(strip $(1)))

.DEFAULT_GOAL := help
.PHONY: help quickstart base install test test-slow test-all test-long lint constraints clean

help:  ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@sed -n '/^# [A-Z]*=/s/^# //p' Makefile

quickstart: $(BASE)  ## trains on glyphs in minutes, evaluates, writes a report with pictures
	@if [ -e "$(RUN)/config.json" ]; then \
	  echo "$(RUN) is there: going on from its last checkpoint; RUN=runs/other starts anew"; fi
	@$(BIN)/bigalign train --config=configs/quickstart.py --workdir="$(RUN)"
	@$(BIN)/bigalign report "$(RUN)"

base: $(BASE)  ## makes .venv with all that training needs

install: $(TEST)  ## makes .venv with all that the tests need

test: $(TEST)  ## the fast tests, a quarter of an hour on two cores
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not long" $(ARGS)

# The fast tests compile without most optimizations; these run what users run, but for those that ask
# for the fixture `unoptimized`.
test-slow: $(TEST)  ## the slow ones alone
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow and not long" $(ARGS)

test-all: test test-slow  ## fast and slow, under an hour on two cores

test-long: $(TEST)  ## before a release
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m long $(ARGS)

lint: $(TEST)  ## style and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/shellcheck launch/*.sh .ci/run

constraints: $(TEST)  ## writes the versions that .venv holds into .ci/constraints.txt
	@$(BIN)/python .ci/freeze.py > .ci/constraints.new
	@mv .ci/constraints.new .ci/constraints.txt

clean:  ## removes .venv, caches and build folders; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BASE): pyproject.toml .ci/constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV), once; this takes a minute or two"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
	  --editable "$(if $(strip $(EXTRAS)),.[$(call list,$(EXTRAS))],.)"
	@touch "$@"

$(TEST): pyproject.toml .ci/constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV), once; this takes a minute or two"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
	  --editable ".[$(call list,test $(EXTRAS))]"
	@touch "$(BASE)" "$@"

# pip is what a half-made environment lacks: Debian's python3 comes without ensurepip.
$(BIN)/pip:
	@for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  "$$python" -m venv $(VENV) && exit 0; \
	  rm -rf $(VENV); \
	  echo "$$python cannot make an environment: its venv module is not whole. On Debian and" >&2; \
	  echo "Ubuntu: apt-get install python3-venv. Another interpreter: make PYTHON=..." >&2; \
	  exit 1; \
	done; \
	echo "No Python >= 3.11 among: $(or $(PYTHON),python3 python3.11 ... python3.14 python)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1
