# The two commands of the README are `make demo` and `make check`; both set up all that they need, on Debian 12 or later.
VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest

.PHONY: all venv guest qemus quick check check-all bench demo clean

all: venv

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import pip' 2>/dev/null || { python=$$(integration/setup.sh python) && $$python -m venv --clear $(VENV); }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[dev,tui]'
	@touch $@

# QEMU and the guest's parts; at once where all is there
guest: venv
	@integration/setup.sh qemu
	@$(PYTHON) -m integration.guest.build >/dev/null

# the QEMUs of other Debian releases; where one cannot be had its tests are skipped
qemus: guest
	@$(PYTHON) -m integration.qemus

# lint, types and everything that needs no QEMU
quick: venv
	$(PYTEST) tests

# the whole suite
check: quick guest qemus
	$(PYTEST) integration -m 'not slow and not bench'

# and what takes long
check-all: quick guest qemus
	$(PYTEST) integration -m 'not bench'

# measurements; they print tables, and fail where a stated bound is exceeded
bench: guest
	$(PYTEST) integration -m bench -s

demo: guest
	@$(PYTHON) -m integration.demo

# .cache holds the fetched packages too
clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
