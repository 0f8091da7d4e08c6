# make demo   set up, then measure what masking saves on this machine, on a real clip
# make test   set up, then run every check of the gate
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT := demo

.PHONY: demo test lint types eager interpreter clean

demo: $(READY)
	$(BIN)/mar-fast bench --out $(OUT) --force

test: lint types eager interpreter

# The set-up runs again only when one of these files has changed.
$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo,hf]'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type-checked as installed: mypy does not see the mapped folders kernels/ and bench/ in an editable install.
types: $(READY)
	rm -rf build/types && mkdir -p build/types
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --config-file pyproject.toml -p mar_fast

eager: $(READY)
	$(BIN)/pytest -q

# An interpreted kernel cannot be compiled and the plain path must be tested too, so this is a run of its own.
interpreter: $(READY)
	TRITON_INTERPRET=1 $(BIN)/pytest -q -m "interpreter or triton_too"

clean:
	rm -rf $(VENV) build $(OUT) *.egg-info
