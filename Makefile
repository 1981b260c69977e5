# `make` lists what there is. ARGS hands anything on: make mla ARGS="size=tiny seed=2", make test ARGS="-k router".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
GROUPS ?= all
DATA ?=
OUT ?= outputs/study

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRAIN := $(BIN)/python train.py
# one thread a worker: two on a busy two-core machine are slower than one; on the CPU, where results are exact to the bit
PYTEST := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# --- set-up
setup: $(INSTALLED)  ## create .venv and install everything (phase 0)
	@echo "installed in $(VENV)"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nano_think needs Python 3.11 or newer: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev,sweep]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps hydra-optuna-sweeper
	@touch $@

# --- from text to samples
data: $(INSTALLED)  ## corpus, splits, token shards and their reports (phase 1)
	$(TRAIN) phase=data $(ARGS)

tokenizer: $(INSTALLED)  ## train the tokenizer, report bytes per token (phase 1)
	$(TRAIN) phase=tokenizer $(ARGS)

expert-transformer: $(INSTALLED)  ## pre-train the Transformer expert (phase 6a)
	$(TRAIN) phase=expert expert=transformer $(ARGS)

expert-diffuser: $(INSTALLED)  ## pre-train the Diffuser expert (phase 6b)
	$(TRAIN) phase=expert expert=diffuser $(ARGS)

expert-state-space: $(INSTALLED)  ## pre-train the State-Space expert (phase 6c)
	$(TRAIN) phase=expert expert=state_space $(ARGS)

mla: $(INSTALLED)  ## train router and MLA over the frozen experts (phase 7)
	$(TRAIN) phase=mla expert=all $(ARGS)

eval: $(INSTALLED)  ## losses, routing, knock-outs, samples: one report (phase 8)
	$(TRAIN) phase=eval $(ARGS)

audit: $(INSTALLED)  ## the leak audit: of an untrained network, or with ARGS="ckpt=..." of a checkpoint
	$(TRAIN) phase=audit $(ARGS)

generate: $(INSTALLED)  ## continue a prompt: make generate ARGS='prompt="Once upon a time"' (phase 8)
	$(TRAIN) phase=generate $(ARGS)

demo: $(INSTALLED)  ## all of it on two cores in minutes, with a report at the end
	$(TRAIN) phase=pipeline experiments=demo $(ARGS)
	@echo "The lines above say where report, dashboard and samples are. Dashboard: make tensorboard"

study: $(INSTALLED)  ## every baseline, three seeds: make study DATA=folder; without DATA draw the kept report again
ifeq ($(DATA),)
	$(TRAIN) phase=study study.redraw=true study.out=experiments/results/study $(ARGS)
else
	$(TRAIN) phase=study experiments=study data=jsonl data.root=$(DATA) study.out=$(OUT) $(ARGS)
endif

sweep: $(INSTALLED)  ## two optimizers times two seeds, one folder a job
	$(TRAIN) -m phase=mla expert=all optimizer=adamw,muon seed=1,2 $(ARGS)

tensorboard: $(INSTALLED)  ## serve the dashboards of all runs
	$(BIN)/python -m tensorboard.main --logdir outputs $(ARGS)

# --- quality
test: $(INSTALLED)  ## all fast tests
	$(PYTEST) -n 2 -m "not slow" $(ARGS)

test-slow: $(INSTALLED)  ## the tests that need minutes each
	$(PYTEST) -m slow $(ARGS)

test-gpu: $(INSTALLED)  ## the same numbers on a GPU, for a machine that has one
	$(BIN)/python -m pytest tests/gpu $(ARGS)

kills: $(INSTALLED)  ## kill runs of every phase 200 times and compare what they leave
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.kills --out outputs/kills $(ARGS)

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

check: lint  ## lint, types, import rules
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## ours and its peers side by side; one group: make bench GROUPS=scan (phase 9)
	$(BIN)/python -m benchmarks $(GROUPS) $(ARGS)

clean:  ## remove everything under outputs/: runs, artefacts, checkpoints
	find outputs -mindepth 1 ! -name .gitkeep -delete

# --- the phases of the plan, by number
phase0: setup  ## = setup
phase1: data  ## = data
phase2: $(INSTALLED)  ## tests of the three experts
	$(PYTEST) tests/experts $(ARGS)
phase3: $(INSTALLED)  ## tests of the vector store
	$(PYTEST) tests/test_vector_index.py tests/test_vector_store.py $(ARGS)
phase4: $(INSTALLED)  ## tests of latent attention and router
	$(PYTEST) tests/test_mla.py tests/nn/test_latent_attention.py tests/ops/test_pooling.py $(ARGS)
phase5: $(INSTALLED)  ## tests of the whole model
	$(PYTEST) tests/test_model.py $(ARGS)
phase6: expert-transformer expert-diffuser expert-state-space  ## all three experts
phase7: mla  ## = mla
phase8: eval generate  ## = eval and generate
phase9: bench  ## = bench

.PHONY: help setup data tokenizer expert-transformer expert-diffuser expert-state-space mla eval audit generate demo \
  study sweep tensorboard test test-slow test-gpu kills lint check bench clean \
  phase0 phase1 phase2 phase3 phase4 phase5 phase6 phase7 phase8 phase9
