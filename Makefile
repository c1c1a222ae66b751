# `make demo`, `make bench` and `make test` need python3 (3.10 or newer, with venv) and nothing else prepared.
# The environment in .venv is made on first use, and again when the pinned versions change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
# Bytecode is made of what is imported, when it is: of everything it would take longer than installing does.
INSTALL := -m pip --disable-pip-version-check install --quiet --no-compile
# Neighbours, which share what they compile and record, stay with one worker as long as the other has work.
WORKERS := -q -n 2 --dist worksteal
ON_CPU := benchmarks/results/cpu/readme.json
INSTALLED := $(VENV)/.installed

OLDEST_TRITON := 3.6.0
NEWEST_TRITON := 3.9.0
STAGES := lint test-plain test-interpreter test-ptx aot-common aot-$(OLDEST_TRITON) aot-$(NEWEST_TRITON)

# What decides which code runs, and how, is said in the rules and not by whoever calls them.
unexport PYTHONPATH TRITON_INTERPRET PYTHONDONTWRITEBYTECODE

# The stages share two cores and one set of caches: one after the other.
.NOTPARALLEL:
.PHONY: help env demo bench bench-cpu train-step test lint format test-plain test-interpreter test-ptx proof test-clients test-gpu sanitize
.PHONY: aot aot-common clean
.DEFAULT_GOAL := help

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(INSTALLED) ## the environment in .venv, with the package installed in place

$(VENV)/.made: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "making $(VENV): a few minutes, once"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) --constraint $(CONSTRAINTS) setuptools
	@touch $@

$(INSTALLED): $(VENV)/.made setup.py pyproject.toml
	@$(BIN)/python $(INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[triton,demo,bench,test]'
	@touch $@

demo: $(INSTALLED) ## trains a real model on real text with its own Attend and with ours, and compares
	@$(BIN)/python examples/demo.py

bench: $(INSTALLED) $(VENV)/.peers ## measures us and our peers on this machine: table, JSON, report and plots (ARGS=--quick)
	@$(BIN)/python benchmarks/run.py $(ARGS)

bench-cpu: $(INSTALLED) ## measures a CPU beside torch's own ways for up to 25 minutes; the same again goes on
	@$(BIN)/python benchmarks/run.py --device cpu --peers flash_attend sdpa 'sdpa math' --minutes 25 --out $(ON_CPU) $(ARGS)

train-step: $(INSTALLED) $(VENV)/.peers ## measures whole training steps, with models' own Attend and with ours (ARGS=--quick)
	@$(BIN)/python benchmarks/run.py --training $(ARGS)

# Other people's models: of what they ask for, they need a part here.
$(VENV)/.peers: .ci/essential.txt $(VENV)/.made
	@$(BIN)/python $(INSTALL) --no-deps --requirement $<
	@touch $@

$(VENV)/clients/.installed: .ci/clients.txt $(VENV)/.made
	@rm -rf $(@D)
	@$(BIN)/python $(INSTALL) --no-deps --target $(@D) --requirement $<
	@touch $@

# Every stage runs, whatever became of the ones before it; the summary comes last.
test: $(INSTALLED) ## everything that needs no GPU
	@failed=0; summary=; \
	for stage in $(STAGES); do \
		printf '\n== %s\n' "$$stage"; \
		start=$$(date +%s); \
		if $(MAKE) --no-print-directory "$$stage"; then verdict=passed; else verdict=FAILED; failed=1; fi; \
		summary="$$summary$$(printf '%-18s %s  %4d s' "$$stage" "$$verdict" "$$(($$(date +%s) - start))")\n"; \
	done; \
	printf "\n$$summary"; \
	exit $$failed

lint: $(INSTALLED) ## ruff: rules and format; mypy: types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## ruff: mends what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test-plain: $(INSTALLED) $(VENV)/.peers ## the tests that need neither a GPU nor the interpreter
	@$(BIN)/pytest $(WORKERS) -m 'not gpu and not interpreter and not ptx and not every'

# Triton reads TRITON_INTERPRET when it is imported, hence a process of its own.
test-interpreter: $(INSTALLED) ## the kernels, in Triton's interpreter
	@TRITON_INTERPRET=1 $(BIN)/pytest $(WORKERS) -m interpreter

test-ptx: $(INSTALLED) ## the compiled kernels, executed on a CPU: the calls that there is time for
	@$(BIN)/pytest $(WORKERS) -m 'ptx and not proof'

# What is done is kept, and not done again while the kernels and these tests are the same.
proof: $(INSTALLED) ## the compiled kernels, executed on a CPU: every call, and every mistake put into them (ARGS=--only TEXT)
	@$(BIN)/python tests/ptx/prove.py --resume $(VENV)/proof.jsonl $(ARGS)

test-clients: $(INSTALLED) $(VENV)/.peers $(VENV)/clients/.installed ## the packages of models that `patch` is tried on, all of them
	@PYTHONPATH=$(VENV)/clients $(BIN)/pytest $(WORKERS) -m clients tests/integrations tests/torch

test-gpu: $(INSTALLED) ## the tests that need a GPU
	@$(BIN)/pytest -m gpu

# In torch's pool of memory an access past the end of one tensor is an access to another: the pool is off. What the
# driver's own calls report is none of ours.
sanitize: $(INSTALLED) ## on a GPU: compute-sanitizer's memcheck over a part of those tests
	@command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is missing: it comes with the CUDA toolkit" >&2; exit 1; }
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes application-only \
		--report-api-errors no --error-exitcode 99 $(BIN)/pytest -q -m gpu tests/semantics/test_semantics.py \
		-k 'bfloat16 and not math and (masks_in_half_precision or the_fused_backward)'

aot: $(INSTALLED) ## compiles every row of the configuration table in every mode, without a GPU
	@$(BIN)/python -m flash_attend.kernels.aot

aot-common: $(INSTALLED) ## compiles three widths of half precision in a mode or two, and one of the others
	@$(BIN)/python -m flash_attend.kernels.aot --common

# What spills differs between Triton versions: that is checked on the pinned one, and of the kernels for Hopper on the
# oldest too, which is the one that Hopper machines have today.
aot-%: $(INSTALLED) $(VENV)/triton-%/.installed ## compiles a subset with another Triton (aot-3.6.0)
	@PYTHONPATH=$(VENV)/triton-$* $(BIN)/python -m flash_attend.kernels.aot --subset \
		--allow-spills triton $(if $(filter $(OLDEST_TRITON),$*),,hopper)

.PRECIOUS: $(VENV)/triton-%/.installed
$(VENV)/triton-%/.installed: $(VENV)/.made
	@rm -rf $(@D)
	@$(BIN)/python $(INSTALL) --no-deps --target $(@D) triton==$*
	@touch $@

# A torch with the Triton that it brings. numpy 2.4 is too new for the interpreter of the oldest one.
test-torch-%: $(VENV)/torch-%/.installed ## the plain tests and a part of the interpreter's with another torch (test-torch-2.10.0)
	@$(VENV)/torch-$*/bin/pytest $(WORKERS) -m 'not gpu and not interpreter and not ptx and not every'
	@TRITON_INTERPRET=1 $(VENV)/torch-$*/bin/pytest $(WORKERS) -m interpreter tests/semantics

.PRECIOUS: $(VENV)/torch-%/.installed
$(VENV)/torch-%/.installed: $(VENV)/.made .ci/essential.txt setup.py pyproject.toml
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@sed -E 's/^(torch|triton)==.*//; s/^numpy==.*/numpy<2.4/' $(CONSTRAINTS) > $(@D)/constraints.txt
	@$(@D)/bin/python $(INSTALL) --constraint $(@D)/constraints.txt setuptools
	@$(@D)/bin/python $(INSTALL) --constraint $(@D)/constraints.txt --no-build-isolation \
		--editable '.[triton,demo,bench,test]' torch==$*
	@$(@D)/bin/python $(INSTALL) --no-deps --requirement .ci/essential.txt
	@touch $@

clean: ## removes the environment, the builds and the caches
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
