# Everything runs in .venv, which `setup` makes; name another with VENV=...
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LLMPRUNE := $(BIN)/llmprune

# make compress MODEL=org/name OUT=runs/name            (the default recipe)
# make compress RECIPE=recipes/smollm2-135m.yaml OUT=runs/x SET="search.trials=50"
RECIPE ?=
MODEL ?=
OUT ?= runs/run
PICK ?= decode_speedup>=1.3
TO ?= $(OUT)/export
DIRS ?= $(TO)
GGUF_TYPE ?= f16
SET ?=
# make push OUT=runs/name REPO=user/name LICENCE=apache-2.0   (private; LICENCE unless the recipe names it)
REPO ?= $(error name a REPO=user/name)
LICENCE ?=
# make baselines OUT=runs/name AT="1.3 1.5" METHODS="flap sleb"   (default: all, at the recipe's speed-ups)
AT ?=
METHODS ?=
# make eval DIRS="runs/name other/child" TASKS=piqa,arc_easy LIMIT=200 OUTPUT=results.json   (PARENT=..., FEWSHOT=5)
# make eval DIRS=runs/demo TASKS=continuation_choice INCLUDE=recipes/tasks                  (after make demo; offline)
TASKS ?=
LIMIT ?=
FEWSHOT ?=
# CHAT=1: prompts go through the tokenizer's chat template
CHAT ?=
INCLUDE ?=
OUTPUT ?=
FIGURES ?=
PARENT ?=
TARGET = $(or $(RECIPE),$(MODEL),$(error name a MODEL=... or a RECIPE=...))

.PHONY: setup demo compress search baselines recover exits report draft export export-gguf export-vllm push bench bench-search bench-families bench-scaling eval \
	export-torchao test test-gpu test-numerics test-oldest test-torchao lint typecheck check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmprune needs Python 3.11 or newer, this is %d.%d; set PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --only-binary xllamacpp --editable '.[llamacpp]' \
		|| echo 'no wheel of xllamacpp was installed: llama.cpp cannot be timed here, and the demo times torch'
	touch $@

demo: setup
	$(BIN)/python scripts/fetch_demo_assets.py --to assets/demo
	settings=$$($(BIN)/python scripts/demo_settings.py) && $(LLMPRUNE) compress recipes/smollm2-135m.yaml --out runs/demo $$settings $(SET)
	$(BIN)/python scripts/make_continuation_choice.py assets/demo/wikipedia.jsonl assets/demo/continuation_choice.jsonl
	$(BIN)/python scripts/sample_text.py assets/demo/SmolLM2-135M-Instruct.Q4_1.gguf runs/demo/export

compress: setup
	$(LLMPRUNE) compress '$(TARGET)' --out '$(OUT)' $(SET)

search: setup
	$(LLMPRUNE) search '$(OUT)' $(if $(or $(RECIPE),$(MODEL)),--recipe '$(TARGET)') $(SET)

baselines: setup
	$(LLMPRUNE) baselines '$(OUT)' $(foreach at,$(AT),--at $(at)) $(foreach method,$(METHODS),--method $(method))

# Hours on a slow CPU: other methods at equal measured speed, and what each part of the search is worth.
bench-search: setup
	$(BIN)/python scripts/fetch_demo_assets.py --to assets/demo
	$(LLMPRUNE) search runs/bench-search --recipe recipes/bench-smollm2-135m.yaml
	$(LLMPRUNE) front runs/bench-search
	$(LLMPRUNE) baselines runs/bench-search
	$(BIN)/python scripts/bench_search.py runs/bench-search
	$(BIN)/python scripts/kill_workers.py --trials 200 --every 2

# A small model of every family is trained once, minutes of one core each, and a whole search is run on each.
bench-families: setup
	$(BIN)/python scripts/fetch_demo_assets.py --to assets/demo
	$(BIN)/python scripts/zoo.py --all
	$(BIN)/python scripts/bench_families.py

# make report OUT=runs/name FIGURES=figures   (FIGURES: every chart as SVG and PNG besides)
report: setup
	$(LLMPRUNE) report '$(OUT)' $(if $(FIGURES),--figures '$(FIGURES)')

export: setup
	$(LLMPRUNE) export '$(OUT)' --pick '$(PICK)' --to '$(TO)'

# make export-gguf TO=DIR GGUF_TYPE=q8_0      adds DIR/model-Q8_0.gguf to an exported checkpoint
export-gguf: setup
	$(LLMPRUNE) convert '$(TO)' --format gguf --gguf-type '$(GGUF_TYPE)'

export-vllm: setup
	$(LLMPRUNE) convert '$(TO)' --format vllm

# Needs pip install 'llmprune[torchao]'.
export-torchao: setup
	$(LLMPRUNE) convert '$(TO)' --format torchao

# make draft OUT=runs/name TO=runs/name/draft   the best draft of a run with search.objective=draft (RECIPE=recipes/draft.yaml)
draft: setup
	$(LLMPRUNE) draft '$(OUT)' $(if $(filter-out file,$(origin TO)),--to '$(TO)')

push: setup
	$(LLMPRUNE) push '$(OUT)' '$(REPO)' $(if $(LICENCE),--licence '$(LICENCE)')

# make recover OUT=runs/name MINUTES=30               distils the picked child (PICK) from its parent
# make recover OUT=runs/name MINUTES=30 PROCESSES=8   on eight GPUs
MINUTES ?= 10
PROCESSES ?= 1
recover: setup
	$(if $(filter-out 1,$(PROCESSES)),$(BIN)/torchrun --standalone --nproc_per_node '$(PROCESSES)' -m llmprune,$(LLMPRUNE)) recover '$(OUT)' --pick '$(PICK)' --minutes '$(MINUTES)' $(SET)

# make exits OUT=runs/name MINUTES=30   where tokens may leave early (SET="exits.trunks=1 exits.budgets=[worst_token_speedup>=0.8]")
exits: setup
	$(LLMPRUNE) exits '$(OUT)' 'exits.minutes=$(MINUTES)' $(SET)

bench: setup
	$(LLMPRUNE) bench $(DIRS)

bench-scaling: setup
	$(BIN)/python scripts/count_work.py
	$(BIN)/python scripts/forecast_shapes.py

eval: setup
	$(LLMPRUNE) eval $(DIRS) $(foreach parent,$(PARENT),--parent '$(parent)') $(if $(TASKS),--tasks '$(TASKS)') $(if $(LIMIT),--limit $(LIMIT)) \
		$(if $(FEWSHOT),--num-fewshot $(FEWSHOT)) $(if $(CHAT),--apply-chat-template) $(if $(INCLUDE),--include-path '$(INCLUDE)') $(if $(OUTPUT),--output '$(OUTPUT)')

# A test process for every core.
test: setup
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

# The lower bounds of pyproject.toml in a .venv of their own. OLDEST="torch=2.13.0" stands in for one that an index lacks.
OLDEST ?=
SMOKE := $(patsubst %,tests/test_%.py,recipe architecture space data sources blocks_library blocks_refit sensitivity families checkpoint recover_distillation run cli card)

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/oldest.py $(OLDEST) > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt --editable . \
		pytest pytest-timeout pytest-xdist hypothesis
	.venv-oldest/bin/python -m pytest --numprocesses logical --dist worksteal --override-ini filterwarnings=default $(SMOKE)

# Sums come out in another order on another CPU: the same tests with other kernels, on one thread and on two. CI takes
# WAYS=avx2-2: what differs in both from the whole suite.
WAYS ?= default-1 default-2 avx2-1 avx2-2
NUMERIC := $(patsubst %,tests/test_%.py,merging blocks_refit blocks_library sensitivity measure baselines_flap gguf gguf_families gguf_proof recover_sequential stored)

test-numerics: setup
	@set -e; for way in $(WAYS); do \
		kernels=$${way%-*} threads=$${way#*-}; \
		echo "ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads"; \
		ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads OMP_WAIT_POLICY=passive \
			$(BIN)/python -m pytest --numprocesses logical --dist worksteal $(NUMERIC); \
	done

# torchao lies beside .venv's packages: once there, it warns on stderr whenever transformers is imported. In one process,
# since more of them would import for longer than they test.
TORCHAO := $(abspath $(VENV))/torchao

test-torchao: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(TORCHAO) torchao
	PYTHONPATH=$(TORCHAO) $(BIN)/python -m pytest tests/test_torchao.py

# On a CUDA device; where there is none, every test says so and is skipped.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

check: lint typecheck test

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find llmprune tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
