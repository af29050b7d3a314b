# dalle-zoo: every target installs what it needs. Requires make, and Python 3.11 or newer with pip.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?=
FUZZ_SECONDS ?= 60
KILLS ?= 300
BENCH ?=
GPU_CHECK ?=
RELEASE ?=
JOBS ?= 2
PEERS_VENV ?= .venv-peers

BIN := $(VENV)/bin
LOWEST := .venv-lowest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MYPY = $(BIN)/mypy
# Warnings are errors; all are printed before the build fails.
DOCS = $(BIN)/python -m sphinx --jobs $(JOBS) --quiet --fail-on-warning --builder html docs build/docs
# The raw text, passed through the environment so that the shell does not interpret quotes and dollar signs in a prompt.
export DALLE_ZOO_PROMPT = $(value PROMPT)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo images test docs test-slow test-browser test-lowest chromium release fuzz kills bench bench-peers gpu-check format clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo
	@echo '  PROMPT="a cat on a pink background"    prompt of make demo'
	@echo '  JOBS=2                                 processes of make test'
	@echo '  PYTHON=python3.12                      Python that creates the environment $(VENV)'

demo: $(VENV)/.demo ## generate a grid of images with the bundled weights (PROMPT="...")
	@if [ -n "$$DALLE_ZOO_PROMPT" ]; then $(BIN)/dalle-zoo demo -- "$$DALLE_ZOO_PROMPT"; else $(BIN)/dalle-zoo demo; fi

images: $(VENV)/.test ## generate the images of the README and the documentation again (seed 0, fixed prompts)
	$(BIN)/python -m tools.doc_images

test: $(VENV)/.test ## run lint, types, documentation and tests, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MYPY)
	$(DOCS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

docs: $(VENV)/.test ## build the documentation, without the network: build/docs/index.html
	$(DOCS)

test-slow: $(VENV)/.test ## run the tests that make test omits
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/.test ## run the tests of the web page in Debian's chromium
	$(BIN)/python -m pytest -m browser tests/web

# uv resolves the lowest versions of what pyproject.toml names, and the newest of what those need. Types are checked against
# the newest versions alone: earlier ones declare fewer types, or wrong ones.
test-lowest: ## run make test, without types, with the lowest versions that pyproject.toml allows
	@$(MAKE) --no-print-directory VENV=$(LOWEST) $(LOWEST)/.python
	@echo '$(call INSTALLING,the lowest versions of all requirements,$(LOWEST))'
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --compile-bytecode \
	  --editable '.[test]'
	$(MAKE) --no-print-directory VENV=$(LOWEST) MYPY=true test

# Without a browser its tests are skipped, with the reason, so a machine that cannot install one passes make test.
chromium: ## install Debian's chromium, which the tests of the web page need (as root)
	@if [ -x /usr/bin/chromium ]; then exit 0; fi; \
	{ command -v apt-get && timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	  timeout 300 apt-get -qq --yes --no-install-recommends install chromium; } >/dev/null || \
	  echo 'chromium could not be installed: the tests of the web page in a browser are skipped' >&2

release: $(VENV)/.test ## build sdist and wheel into dist/ and check them (RELEASE=--fresh)
	$(BIN)/python -m tools.release $(RELEASE)

fuzz: $(VENV)/.test ## feed damaged files to their readers (FUZZ_SECONDS=60)
	$(BIN)/python -m tools.fuzz_readers --seconds $(FUZZ_SECONDS)

kills: $(VENV)/.test ## kill commands at random moments and compare their results (KILLS=300)
	$(BIN)/python tools/kill_commands.py --kills $(KILLS)

bench: $(VENV)/.test ## measure speed and update docs/design/speed.md (BENCH="decoding --threads 1")
	$(BIN)/python -m benchmarks $(BENCH)

bench-peers: $(PEERS_VENV)/.peers ## compare speed with other packages and update docs/design/speed.md (BENCH="--shapes S")
	$(PEERS_VENV)/bin/python -m benchmarks.peers $(BENCH)

gpu-check: $(VENV)/.test ## check and measure everything on one GPU, in 8 minutes (GPU_CHECK="--stages tests sampling")
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK)

format: $(VENV)/.test ## apply ruff fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all caches; keep runs/ and outputs
	rm -rf $(VENV) $(LOWEST) $(PEERS_VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. It is reinstalled only after pyproject.toml changed.

INSTALLING = installing $(1) into $(or $(2),$(VENV)) (the first time 1-3 minutes; about 6 GB where torch comes with CUDA) ...

$(VENV)/.demo: pyproject.toml $(VENV)/.python
	@echo '$(call INSTALLING,dalle-zoo)'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml tests/requirements-parity.txt $(VENV)/.python
	@echo '$(call INSTALLING,dalle-zoo and the requirements of its tests)'
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps --requirement tests/requirements-parity.txt
	@touch $@ $(VENV)/.demo

# The compared packages have an environment of their own, which takes torch and all else from that of dalle-zoo.
$(PEERS_VENV)/.peers: benchmarks/requirements-peers.txt $(VENV)/.test
	@echo 'installing the compared packages into $(PEERS_VENV) (20 MB) ...'
	@$(BIN)/python -m venv --clear --without-pip $(PEERS_VENV)
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' > \
	  "$$($(PEERS_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/dalle_zoo_environment.pth"
	@$(BIN)/python -m pip --quiet --disable-pip-version-check --python $(PEERS_VENV)/bin/python install --no-deps \
	  --requirement benchmarks/requirements-peers.txt
	@touch $@

# Debian's Python may lack ensurepip (package python3-venv); then the pip outside installs pip into the environment.
$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo '$(PYTHON) was not found: install Python 3.11 or newer, or pass its name: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dalle-zoo needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Pass a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo 'creating the environment $(VENV) with $(PYTHON) ...'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; fi || { \
	  echo 'The environment could not be created. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@touch $@
