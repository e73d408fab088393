# Two commands for a fresh machine: `make demo` and `make test`. Both install into .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test test-slow lint install clean

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
	for spec in models/demo random:models/demo histogram; do \
		name=$$(echo $$spec | tr ':/' '--'); \
		$(BIN)/python -m finetune knn --backbone $$spec --data data/demo --out results/demo/$$name --overwrite || exit 1; \
		$(BIN)/python -m finetune probe --backbone $$spec --data data/demo --out results/demo/$$name --overwrite \
			--methods logistic || exit 1; \
	done
	$(BIN)/python -m finetune report results/demo --out results/demo/report.html
	@echo "pretraining: runs/demo/report.html    evaluation: results/demo/report.html"

test: install
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf data/demo runs/demo models/demo results/demo
