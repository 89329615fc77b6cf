# `make demo` and `make test` work in a fresh clone: each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lowest slow soak fuzz lint types format docs lock audit wheel-check atlas screenshots \
	clean system browser

demo: $(VENV)/.demo
	$(BIN)/mlx_hiermem demo

test: $(VENV)/.dev browser
	$(BIN)/python -m pytest -n auto --dist loadfile

slow: $(VENV)/.dev browser
	$(BIN)/python -m pytest -m slow --timeout 3600

# What docs/reliability.md says. SHARE=0.01 is quick.
SHARE := 1

soak: $(VENV)/.dev
	$(BIN)/python -m pytest tests/reliability -m soak --share $(SHARE) --timeout 0 --figures build/soak.json

fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest tests/reliability -m fuzz --share $(SHARE) --timeout 0 --figures build/fuzz.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, into build/site.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --site-dir build/site

# The wheel in an empty environment: every subcommand, and an answer.
wheel-check:
	$(PYTHON) -m tests.wheel_check

# The fast suite with the oldest releases that pyproject.toml allows.
lowest: $(VENV)/.dev browser
	$(PYTHON) -m venv --clear build/lowest
	$(BIN)/uv pip install --python build/lowest --resolution lowest-direct -e '.[dev]'
	build/lowest/bin/python -m pytest -n auto --dist loadfile

# Renews the pins that `make test` installs.
lock: $(VENV)/.dev
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --upgrade \
	  --custom-compile-command "make lock" --no-annotate -o requirements-dev.lock

# Known weaknesses of what is pinned; asks the package index.
audit: $(VENV)/.dev
	$(BIN)/pip-audit --requirement requirements-dev.lock --no-deps --disable-pip

# Trains the model that ships from nothing and writes it to mlx_hiermem/assets/atlas.
atlas: $(VENV)/.dev
	$(BIN)/python -m apps.atlas build --seed 0

# The pictures of the demo page in docs/images, of the model that ships.
screenshots: $(VENV)/.dev browser
	$(BIN)/python -m tests.browser.screenshots

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Editable, so that the sources of this folder are what runs.
$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.dev: pyproject.toml requirements-dev.lock | $(BIN)/pip
	$(BIN)/pip install -e '.[dev]' -c requirements-dev.lock
	@touch $@

$(BIN)/pip: | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# Best effort: what pip cannot install, where apt-get exists and asks for no password.
# OpenBLAS is what MLX's CPU backend needs to be fast; Chromium runs the tests of the demo page.
system:
	@$(PYTHON) -c 'import ensurepip' || $(call apt,python3-venv)
	@[ "$$(uname)" != Linux ] || $(PYTHON) -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' \
	  2>/dev/null || $(call apt,libopenblas0-pthread)

browser:
	@command -v chromium >/dev/null || $(call apt,chromium)

apt = { echo "$(1) is missing: trying apt-get"; sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  command -v apt-get >/dev/null && { $$sudo apt-get update -qq; \
	  $$sudo apt-get install -y -qq --no-install-recommends $(1) >/dev/null; } || \
	  echo "$(1) could not be installed; going on without it"; }
