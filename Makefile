# Everything starts here; each target is a line or two, and the work is in tools/.
#
#   make dyno    stock and tuned side by side, on this machine     make dyno ARGS="--steps 500 --device cuda"
#   make test    all tests, C++ and Python                         make test ARGS="-k norm"
#   make build   the library, in place                             make bench, lint, wheel, clean
#
# PYTHON=/usr/bin/python3 make dyno uses that interpreter and its packages as they are, with no .venv.

ifdef PYTHON
PY := $(PYTHON)
set_up = @$(PY) tools/setup_environment.py --check
else
PY := .venv/bin/python
set_up = @python3 tools/setup_environment.py
endif

export PYTHONPATH := python$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: dyno test build bench lint wheel clean

dyno:
	$(set_up) runtime build
	@$(PY) tools/build.py
	@$(PY) -m redline dyno $(ARGS)

test:
	$(set_up) runtime build test
	@$(PY) tools/build.py --all
	@$(PY) tools/run_tests.py $(ARGS)

build:
	$(set_up) build
	@$(PY) tools/build.py

bench: build
	@$(PY) bench/bench.py $(ARGS)

lint:
	$(set_up) lint
	@PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m pre_commit run --all-files $(ARGS)

wheel:
	$(set_up) build
	@$(PY) -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

clean:
	rm -rf build dist python/redline/lib
