# Two commands for a fresh machine: `make demo` and `make test`. Both install into .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test test-slow soak lint docs install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

# Synthetic lesions -> shards -> pretraining -> export -> probes (ours, random weights, colour histogram) -> report.
demo: install
	test -f data/demo/index.json || $(BIN)/python -m shards demo --out data/demo
	$(LAUNCH) pretrain recipe=demo data.train=data/demo out=runs/demo
	$(BIN)/python -m hybridssl export runs/demo --out models/demo --overwrite
	$(MAKE) --no-print-directory -j 2 evaluate-ours evaluate-random evaluate-histogram
	$(BIN)/python -m finetune report results/demo --out results/demo/report.html
	@echo "pretraining: runs/demo/report.html    evaluation: results/demo/report.html"

# Features of one backbone under both protocols; one thread each, since two of these run side by side.
SPEC_ours := models/demo
SPEC_random := random:models/demo
SPEC_histogram := histogram
evaluate-%:
	OMP_NUM_THREADS=1 $(BIN)/python -m finetune knn --backbone $(SPEC_$*) --data data/demo --overwrite \
		--out results/demo/$* >/dev/null
	OMP_NUM_THREADS=1 $(BIN)/python -m finetune probe --backbone $(SPEC_$*) --data data/demo --overwrite \
		--methods logistic --out results/demo/$* >/dev/null

# One thread each: two workers with a thread a core each wait for one another and take three times as long.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

# Two hours of the demo recipe, one run in peace and one killed again and again: do they end alike, and stay small?
soak: install
	$(BIN)/python -m benchmarks.soak --hours 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site: docs/*.md, and the reference from the code. Look at it with `python -m http.server -d site`.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf data/demo runs/demo models/demo results/demo
