# The two commands of the README are `make demo` and `make check`; both set up everything they need.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: all venv quick check check-all bench demo clean

all: venv

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,tui]'
	touch $@

quick: venv
	$(BIN)/python -m pytest tests
