# Everything needs only python3, a C++ compiler and pip. `make demo` runs the main job, `make test` the checks.
# `make demo DATA=fashion-mnist` runs it for classification. PASSIVE: threads that wait leave the core to others.
# `make test` shares the tests among WORKERS processes and draws the same random networks every time; pytest alone draws new ones.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint zoo bench docs wheel clean

demo: .venv/demo.ok
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/cpd-fast compress --demo $(if $(DATA),--data $(DATA))

test: lint
	$(BIN)/pytest -rs -n $(WORKERS) --dist worksteal --hypothesis-profile=ci

lint: .venv/test.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu)$$')

zoo: .venv/test.ok
	$(BIN)/pytest tests/zoo -m "slow or not slow"

bench: .venv/test.ok
	$(BIN)/pytest bench --benchmark-enable --benchmark-only

# One stamp a set of extras. The library is rebuilt when what it is made of changes.
NATIVE := $(wildcard csrc/* csrc/*/*) CMakeLists.txt setup.py pyproject.toml constraints.txt
.venv/demo.ok: EXTRAS = train,export
.venv/test.ok: EXTRAS = test,zoo,loops,tensorboard
.venv/docs.ok: EXTRAS = docs
.venv/%.ok: $(NATIVE)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

docs: .venv/docs.ok
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A CPU-only wheel and, where nvcc is, one with CUDA code; each is installed in a clean environment and used there.
wheel:
	bash bench/wheel.sh $(PYTHON)

clean:
	rm -rf .venv build dist *.egg-info
