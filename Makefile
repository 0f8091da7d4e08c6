# make demo   set up, then measure what masking saves on this machine, on a real clip
# make test   set up, then run every check of the gate
# make matrix compile every kernel for every GPU, with the pinned Triton and the oldest supported one; minutes
# make oldest, make newest   the tests of torch.compile, export and fake tensors with other torch versions; 5 GB each
# make kills  twenty training runs that are killed and go on, compared bit by bit with one that is not; minutes
# make fuzz   damages small films and reads them, for ten minutes
# make gpu    on a machine with a GPU and its own torch and Triton: all kernel tests there, then what decides is measured,
#             in minutes and without a network; FULL=1 measures everything
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT := demo
RESULTS := bench/results/gpu

.PHONY: demo test lint types eager interpreter suites matrix kills fuzz oldest newest gpu gpu-ops gpu-sizes sanitize clean

demo: $(READY)
	$(BIN)/mar-fast demo --out $(OUT) --force

# Two test runs at once, each of which keeps one core busy; the third begins where the first one ends.
test: lint types
	$(MAKE) --no-print-directory --output-sync=target -j2 eager interpreter suites

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
	rm -rf build/types build/lib && mkdir -p build/types
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --config-file pyproject.toml -p mar_fast

SUITES := tests/bench/test_suites.py tests/bench/test_dropin_suite.py

eager: $(READY)
	$(BIN)/pytest -q $(addprefix --ignore=,$(SUITES))

suites: $(READY)
	$(BIN)/pytest -q $(SUITES)

# An interpreted kernel cannot be compiled and the plain path must be tested too, so this is a run of its own.
interpreter: $(READY)
	TRITON_INTERPRET=1 $(BIN)/pytest -q -m "interpreter or triton_too"

matrix: $(READY) build/triton36
	$(BIN)/pytest -q tests/kernels/test_compile_check.py -m "matrix or not matrix"
	PYTHONPATH=$(CURDIR)/build/triton36 $(BIN)/pytest -q tests/kernels/test_compile_check.py -m "matrix or not matrix"

kills: $(READY)
	MAR_FAST_KILLS=20 $(BIN)/pytest -q tests/train/test_resume.py

fuzz: $(READY)
	$(BIN)/python tests/data/fuzz_films.py 600

build/triton36: | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0

# Triton 3.6 does not interpret every kernel with numpy 2.4. Each torch brings its own Triton.
TORCH_oldest := torch==2.11.* numpy<2.4
TORCH_newest := torch==2.14.1

oldest newest: %: build/%/.ready
	build/$@/bin/pytest -q -m compiles
	TRITON_INTERPRET=1 build/$@/bin/pytest -q -m "compiles and (interpreter or triton_too)"

build/%/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv build/$*
	grep -vE "^(torch|triton|numpy)=" constraints.txt > build/$*/constraints.txt
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check -c build/$*/constraints.txt \
		$(foreach package,$(TORCH_$*),"$(package)") -e '.[test,hf]'
	touch $@

# Its own Python, with -P: the repository's folder kernels/ must not be importable by that name. A red test ends it
# before anything is measured. Half of the cores for each of the two test runs: they compile while they wait.
PARALLEL = $(shell $(PYTHON) -c "import importlib.util as u, os; \
	print(f'-n {max(1, os.cpu_count() // 2)} --dist worksteal' if u.find_spec('xdist') else '')")

gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(MAKE) --no-print-directory --output-sync=target -j2 gpu-ops gpu-sizes
	$(PYTHON) -P -m mar_fast.bench gpu --force --out $(RESULTS) $(if $(FULL),--full)

gpu-ops:
	MAR_FAST_TEST_DEVICE=cuda $(PYTHON) -P -m pytest -q $(PARALLEL) -m triton_too tests/kernels/test_ops.py tests/kernels/test_op_rules.py

gpu-sizes:
	$(PYTHON) -P -m pytest -q $(PARALLEL) -m gpu

# Memory errors and races of the kernels, on small cases; slow.
sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 MAR_FAST_TEST_DEVICE=cuda compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -P -m pytest -q -m triton_too tests/kernels/test_ops.py -k "17 or 33"
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 MAR_FAST_TEST_DEVICE=cuda compute-sanitizer --tool racecheck --error-exitcode 1 \
		$(PYTHON) -P -m pytest -q -m triton_too tests/kernels/test_ops.py -k "attention_head_sizes and float16"

clean:
	rm -rf $(VENV) build $(OUT) *.egg-info
