# `make demo` and `make test` set up all they need; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv

ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# ninja is in the environment, which nobody has activated.
export PATH := $(abspath $(VENV)/bin):$(PATH)
endif

# The build writes it last, beside the extension.
EXTENSION := deepcontrol_cuda/_build_info.json
BUILD := $(PY) setup.py build_ext --inplace

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed, this is %s. Name another: make PYTHON=python3.12" % sys.version.split()[0])
endef

define DESCRIBE
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    print(sys.prefix, sys.version, version("torch"))
except PackageNotFoundError:
    sys.exit("This Python has no torch; without VENV=none an environment is made that has it")
endef
# Recipes hand each of their lines to a shell of its own, so these get there as a variable.
export CHECK_PYTHON DESCRIBE

.PHONY: help demo test bench gpu build lint clean distclean FORCE

help:
	@echo 'make demo       train a small net with Batch Norm and with Deep Control, write report/'
	@echo 'make test       run the tests; ARGS="-k name" goes to pytest'
	@echo 'make bench      time the layers; ARGS goes to the benchmark'
	@echo 'make gpu        on a machine with a GPU: build for it, test, time, and record which kernels are proven'
	@echo 'make build      build the extension in place'
	@echo 'make lint       check style with ruff'
	@echo 'make clean      remove what was built; distclean removes .venv too'
	@echo
	@echo 'Each one first does the set-up that is missing: the environment, its packages, the extension.'
	@echo 'PYTHON=python3  the Python, 3.10 or newer, that the environment is made from'
	@echo 'VENV=.venv      the environment; none = install nothing, use $$(PYTHON) and the torch it has'

demo: $(EXTENSION)
	$(PY) -m deepcontrol_cuda demo $(ARGS)

test: $(EXTENSION)
	$(PY) -m pytest $(ARGS)

bench: $(EXTENSION)
	$(PY) -m bench layers $(ARGS)

# Looks first for what is missing: building for nothing would take minutes.
gpu: build/environment
	@architecture=$$($(PY) -m bench gpu --architecture) \
		&& DEEPCONTROL_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST-$$architecture} $(BUILD)
	$(PY) -m bench gpu $(ARGS)

# Always runs, unlike $(EXTENSION), so that it also mends an extension that another build has put there.
build: build/environment
	$(BUILD)

lint: $(INSTALLED)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

clean:
	rm -rf build dist *.egg-info deepcontrol_cuda/_C*.so $(EXTENSION)
	rm -rf report .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# Directories are listed too: they change when a file comes or goes.
$(EXTENSION): build/environment setup.py deepcontrol_cuda/_version.py $(shell find csrc)
	$(BUILD)

# What a build depends on besides files. Rewritten only when it has changed.
build/environment: $(INSTALLED) FORCE
	@mkdir -p build
	@$(PY) -c "$$CHECK_PYTHON"
	@$(PY) -c "$$DESCRIBE" >$@.new
	@echo "$${CXX-c++} $${DEEPCONTROL_CUDA-} $${DEEPCONTROL_EXTENSION-}" >>$@.new
	@cmp -s $@.new $@ || cp $@.new $@

ifdef INSTALLED
$(INSTALLED): requirements-dev.txt
	@$(PY) -m pip --version >/dev/null 2>&1 \
		|| { $(PYTHON) -c "$$CHECK_PYTHON" && echo 'Making $(VENV)' && $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install -r requirements-dev.txt
	@touch $@
endif
