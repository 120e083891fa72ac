# make demo    take W_Q out of the sample GPT-2 and print what it cost
# make check   run the quick tests alone, for a first answer
# make test    run all the tests
# make numerics    run the tests that depend most on rounding, with torch's plainest kernels (KERNELS=avx2: with those)
# make versions    run the tests of the model code with the oldest, vLLM's and the newest transformers (VERSIONS="5.4.0")
# make lint types format
# Each makes its own virtual environment in .venv first. Needs Python 3.10 or newer: PYTHON=python3.12 make test

PYTHON ?= python3
JOBS ?= 2
ARGS =
KERNELS = default
VERSIONS = 5.4.0 5.19.0 newest

# What is bounded by rounding, and so by the order in which a processor's kernels add up.
NUMERICS := tests/calibrate tests/healing/test_loss.py tests/models/test_architectures.py \
  $(addprefix tests/conversion/test_,distributed_convert.py forecast_work.py) \
  $(addprefix tests/eval/test_,perplexity.py token_scores.py score_windows.py) \
  $(addprefix tests/surgery/test_,folding.py gauge.py materialize.py nanogpt.py norm_fusion.py stream_basis.py)

# The demo's settings, for the command line only (never taken from the environment):
#   make demo MODEL=path/to/checkpoint TEXT=mine.txt EVAL_TEXT=other.txt QUERY="select low-rank:32" OUT=reduced
MODEL = samples/gpt2
QUERY = key-shared identity
TEXT = samples/kjv_train.txt
EVAL_TEXT = $(if $(filter samples/kjv_train.txt,$(TEXT)),samples/kjv_heldout.txt)
TOKENS = 16384
EVAL_TOKENS = 8192
CONTEXT =
OUT =
DEMO_OUT := .cache/demo

# What runs inside a reduced model, and what loads it.
MODEL_CODE := tests/modeling tests/eval/test_reload.py

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv check test numerics versions lint types format demo clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found; name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; ok = sys.version_info >= (3, 10); found = sys.version.split()[0]; sys.exit(not ok and \
	  f"error: qectomy needs Python 3.10 or newer, and $(PYTHON) is {found}; name another: make PYTHON=python3.12")'
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $(STAMP)

# One thread per worker: the models are tiny, and torch's threads would compete with the workers.
check test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(if $(filter check,$@),-m 'not slow') $(ARGS)

numerics: $(STAMP)
	ATEN_CPU_CAPABILITY=$(KERNELS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS) $(NUMERICS)

# Each in an environment of its own, which finds all else in .venv: pip puts a transformers, and what it wants, before it.
versions: $(VERSIONS:%=$(VENV)/transformers-%/.installed)
	@for version in $(VERSIONS); do \
	  echo "transformers $$version: $$($(VENV)/transformers-$$version/bin/python -c 'import transformers as t; print(t.__version__)')"; \
	  PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(VENV)/transformers-$$version/bin/python -m pytest -n $(JOBS) --dist worksteal \
	    -p no:cacheprovider $(ARGS) $(MODEL_CODE) || exit 1; \
	done

$(VENV)/transformers-%/.installed: $(STAMP)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo $(@D)/lib/python3.*/site-packages)/base.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade transformers$(if $(filter newest,$*),,==$*)
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An output folder named by OUT is never removed; the demo's own one, from an earlier run, is once all else is in order.
demo: $(STAMP)
	$(BIN)/python samples/demo.py "$(MODEL)" --out "$(or $(OUT),$(DEMO_OUT))" $(if $(OUT),,--replace) --query $(QUERY) \
	  --text "$(TEXT)" $(if $(EVAL_TEXT),--eval-text "$(EVAL_TEXT)") \
	  --tokens $(TOKENS) --eval-tokens $(EVAL_TOKENS) $(if $(CONTEXT),--context $(CONTEXT))

# .cache/ holds the fetched model and stays.
clean:
	rm -rf $(VENV) $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
