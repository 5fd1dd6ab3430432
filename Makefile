# Every target runs in .venv and creates it if needed; `make` alone lists the targets.
#
# PYTHON=python3.13   interpreter for .venv (default: the first one that is new enough)
# EXTRAS=cuda         also install JAX for that device: cuda or tpu
# RUN=runs/again      workdir of the quickstart
# EXPERIMENTS="gap batches"   of make experiments; they need BIGALIGN_DATA and MINILM
# ARGS="-k sharding"  more arguments for pytest; of make bench, the benchmarks: ARGS="step loader"
# JOBS=4              number of test processes

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?=
RUN ?= runs/quickstart
ARGS ?=
JOBS ?= 2
# All scripts in experiments/ but the modules that they share.
EXPERIMENTS ?= $(filter-out arms icons,$(basename $(notdir $(sort $(wildcard experiments/*.py)))))

space := $(subst ,, )
comma := ,
# .installed, .installed-test, .installed-cuda, .installed-test-cuda, ...: empty files that record
# what is already installed in .venv.
BASE := $(VENV)/.installed$(subst $(space),,$(addprefix -,$(EXTRAS)))
TEST := $(VENV)/.installed-test$(subst $(space),,$(addprefix -,$(EXTRAS)))
BENCH := $(VENV)/.installed-bench$(subst $(space),,$(addprefix -,$(EXTRAS)))
OPEN_CLIP := $(VENV)/.installed-open-clip
list = $(subst $(space),$(comma),$(strip $(1)))

.DEFAULT_GOAL := help
.PHONY: help quickstart base install test test-slow test-optimized test-full test-all test-long lint bench experiments open-clip constraints dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@sed -n '/^# [A-Z]*=/s/^# //p' Makefile

quickstart: $(BASE)  ## train on glyphs for minutes, evaluate, write a report with images
	@if [ -e "$(RUN)/config.json" ]; then \
	  echo "$(RUN) exists: resuming from its last checkpoint; RUN=runs/other starts a new run"; fi
	@$(BIN)/bigalign train --config=configs/quickstart.py --workdir="$(RUN)"
	@$(BIN)/bigalign report "$(RUN)"

base: $(BASE)  ## create .venv with everything that training needs

install: $(TEST)  ## create .venv with everything that the tests need

test: $(TEST)  ## run the fast tests, five minutes on two cores
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not optimized and not long" $(ARGS)

test-slow: $(TEST)  ## run only the slow tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow and not optimized and not long" $(ARGS)

# The fast and the slow tests compile without most optimizations of XLA.
test-optimized: $(TEST)  ## run the slow tests that compile as users do
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "optimized and not long" $(ARGS)

# One run of pytest collects the tests once, and fills the time of both cores better than two.
test-full: $(TEST)  ## run the fast and the slow tests together, half an hour on two cores
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not optimized and not long" $(ARGS)

test-all: test-full test-optimized  ## run all but the longest tests, 40 minutes on two cores

test-long: $(TEST)  ## run the longest tests, before a release
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m long $(ARGS)

lint: $(TEST)  ## check style, formatting and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/shellcheck launch/*.sh .ci/run

bench: $(BENCH) $(OPEN_CLIP)  ## run the benchmarks, half an hour on two cores, into benchmarks/results
	@$(BIN)/python benchmarks/run.py $(ARGS)

# Each writes runs/experiments/NAME; one that fails does not end the others.
experiments: $(TEST) $(OPEN_CLIP)  ## run the experiments, hours on two cores, into runs/experiments
	@failed=""; for name in $(EXPERIMENTS); do \
	  echo "== $$name"; \
	  $(BIN)/python experiments/$$name.py runs/experiments/$$name || failed="$$failed $$name"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

open-clip: $(OPEN_CLIP)  ## install open_clip, to compare with

constraints: $(TEST)  ## write the versions in .venv to .ci/constraints.txt
	@$(BIN)/python .ci/freeze.py > .ci/constraints.new
	@mv .ci/constraints.new .ci/constraints.txt

# A source distribution, and the wheel that is built from it alone.
dist: $(TEST)  ## build the source distribution and the wheel in dist/
	@rm -rf dist && mkdir dist
	@$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > dist/log
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir dist dist/*.tar.gz
	@rm dist/log && ls dist

clean:  ## remove .venv, caches and build folders, but no runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BASE): pyproject.toml setup.py .ci/constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV), once; this takes a minute or two"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
	  --editable "$(if $(strip $(EXTRAS)),.[$(call list,$(EXTRAS))],.)"
	@touch "$@"

$(TEST): pyproject.toml setup.py .ci/constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV), once; this takes a minute or two"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
	  --editable ".[$(call list,test $(EXTRAS))]"
	@touch "$(BASE)" "$@"

$(BENCH): pyproject.toml setup.py .ci/constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV), once; this takes a minute or two"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
	  --editable ".[$(call list,bench search $(EXTRAS))]"
	@touch "$(BASE)" "$@"

# Without its torchvision, because the package index has no build of that for a CPU torch. A build for
# CUDA serves, since only its Python part is used; in site-packages, it would break every import of a
# model of transformers, so it gets a folder of its own, which the programs that need it read.
$(OPEN_CLIP): Makefile | $(BIN)/pip
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0 timm==1.0.31
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/torchvision-without-torch torchvision==0.28.0
	@touch "$@"

# An environment without pip is incomplete: Debian's python3 has no ensurepip.
$(BIN)/pip:
	@for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  "$$python" -m venv $(VENV) && exit 0; \
	  rm -rf $(VENV); \
	  echo "$$python cannot create an environment: its venv module is incomplete. On Debian and" >&2; \
	  echo "Ubuntu: apt-get install python3-venv. Another interpreter: make PYTHON=..." >&2; \
	  exit 1; \
	done; \
	echo "No Python >= 3.11 among: $(or $(PYTHON),python3 python3.11 ... python3.14 python)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1
