# The commands of the README. Each sets up what it needs: a virtual environment in .venv with pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-slurm test-gpu check docs picture clean

demo: $(VENV)/done  ## the whole method in miniature, on real text
	$(BIN)/python -m cpt_merge.recipes.demo.prepare --out runs/demo-inputs
	$(BIN)/cpt-merge run recipes/demo.yaml

test: $(VENV)/done  ## the tests, a file at a time on each of two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/done  ## the slow ones too
	$(BIN)/python -m pytest -m "not slurm and not gpu"

test-slurm: $(VENV)/done  ## on a throw-away Slurm cluster, which it installs (Debian's packages) and starts; as root
	$(BIN)/python -m pytest -m slurm tests/slurm

test-gpu: $(VENV)/done  ## those of one GPU, where there is one
	$(BIN)/python -m pytest -m gpu tests/gpu

check: $(VENV)/done  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/*.sh

docs: $(VENV)/done  ## docs that are generated from the code
	$(BIN)/python -m cpt_merge.launcher.reference > docs/recipe.md

picture:  ## docs/demo-report.png, from the demo's report; needs Debian's chromium and fonts-noto-cjk
	$(BIN)/cpt-merge report runs/demo
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --blink-settings=preferredColorScheme=1 \
		--window-size=1366,1840 --screenshot=docs/demo-report.png file://$(CURDIR)/runs/demo/report.html

$(VENV)/done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[demo,dev]"
	$(INSTALL) --no-deps --upgrade --target $(VENV)/tokenizer-files mistral-common dashscope  # never imported
	touch $@

clean:
	rm -rf $(VENV) runs
