# Needs Python 3.11+ and make; the Kafka parts need Java 17 and Maven too.
PYTHON ?= python3.11
RUN_DIR ?=
BIN := .venv/bin
STAMP := .venv/.ready
CREWAI := .venv-crewai/bin
CREWAI_STAMP := .venv-crewai/.ready
VLLM_STAMP := .venv-vllm/.ready
VERL_STAMP := .venv-verl/.ready
OPS_STAMP := .venv-ops/.ready
NPM_OPS_STAMP := .npm-ops/.ready
UV := .venv-uv/bin/uv
ON_CPU := PYTHONPATH=$(CURDIR)/tests/pipeline/algorithms/verl VERL_USE_EXTERNAL_MODULES=cpu_platform VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda
export UV_COMPILE_BYTECODE := 1
# CI's machine is small and shared: what fails there among others runs once more, alone. The log has both.
again = $(if $(CI),|| $(PYTEST) $(1) --last-failed --last-failed-no-failures none)
PYTEST := $(BIN)/python -m pytest
SPREAD := --dist loadfile --no-loadscope-reorder
FAST := -m "not slow and not vllm"
SLOW := -m "slow and not vllm and not verl"
VLLM := -m "vllm and not verl"
.PHONY: setup setup-crewai vllm verl ops compose-test demo demo-kafka demo-vllm demo-sft demo-apo demo-judge demo-verl test test-verl test-all lint types bench chaos clean

setup: $(STAMP)

# uv lives in an environment of its own, so that nothing but Python has to be installed.
$(UV):
	@$(PYTHON) -m venv .venv-uv
	@.venv-uv/bin/pip install --quiet --disable-pip-version-check uv

$(STAMP): pyproject.toml constraints.txt | $(UV)
	@echo "setting up .venv: some GB, which may take minutes without a word"
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,frameworks,train]'
	@touch $@

# CrewAI wants another openai than the other frameworks do: an environment of its own.
setup-crewai: $(CREWAI_STAMP)

$(CREWAI_STAMP): pyproject.toml constraints-crewai.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-crewai
	$(UV) pip install --quiet --python $(CREWAI)/python -c constraints-crewai.txt -e '.[dev,crewai]'
	@touch $@

# vLLM on a CPU has an environment of its own: its transformers and verl's exclude each other. Without --no-deps it would ask for
# torch==2.13.0+cpu and torchvision; the first is on no ordinary index, the second breaks its imports.
vllm: $(VLLM_STAMP)

$(VLLM_STAMP): constraints-vllm.txt | $(UV)
	@echo "setting up .venv-vllm: some more GB, which may take minutes without a word"
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-vllm
	$(UV) pip install --quiet --python .venv-vllm/bin/python --no-deps -r constraints-vllm.txt
	@touch $@

# verl brings Ray and a hundred packages with it, and caps some of them: an environment of its own, in which only its job runs.
verl: $(VERL_STAMP)

$(VERL_STAMP): pyproject.toml constraints-verl.txt | $(UV)
	@echo "setting up .venv-verl: some GB, which may take minutes without a word"
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-verl
	$(UV) pip install --quiet --python .venv-verl/bin/python -c constraints-verl.txt -e '.[verl]'
	@touch $@

# What checks deploy/: linters and schemas of containers and of Kubernetes, and the types of Grafana's dashboards. Without npm, the last are skipped.
ops: $(OPS_STAMP) $(NPM_OPS_STAMP)

$(OPS_STAMP): constraints-ops.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-ops
	$(UV) pip install --quiet --python .venv-ops/bin/python --no-deps -r constraints-ops.txt
	@touch $@

$(NPM_OPS_STAMP): Makefile
	@mkdir -p .npm-ops
	-npm install --prefix .npm-ops --no-save --no-audit --no-fund --silent @grafana/schema@13.2.3 typescript@5.9.3
	@touch $@

# Builds the images and runs 40 rollouts in containers, with Podman. Skipped, with what to install, where that is missing.
compose-test: setup ops
	$(PYTEST) tests/e2e/operations/test_compose.py

demo: setup
	@$(BIN)/python -m examples.calculator.demo --run-dir $(or $(RUN_DIR),runs/demo)

demo-kafka: setup
	@$(BIN)/python -m examples.calculator.demo --kafka --run-dir $(or $(RUN_DIR),runs/demo-kafka)

demo-vllm: setup vllm
	@$(BIN)/python -m examples.calculator.demo --vllm --run-dir $(or $(RUN_DIR),runs/demo-vllm)

# A new model learns from what `make demo` has recorded.
demo-sft: setup
	@test -d runs/demo/store || $(MAKE) demo
	@rm -rf runs/demo-sft
	@$(BIN)/millstream train examples/calculator/sft.toml

# A prompt is searched for; the models are scripted.
demo-apo: setup
	@$(BIN)/python -m examples.prompts.demo --run-dir $(or $(RUN_DIR),runs/demo-apo) --ui-port 0

# A judge rewards the agent; the judge is scripted.
demo-judge: setup
	@$(BIN)/python -m examples.judge.demo --run-dir $(or $(RUN_DIR),runs/demo-judge)

# verl on a CPU: the platform that it runs on there is one of the tests' own.
demo-verl: setup verl
	@$(ON_CPU) $(BIN)/python -m examples.calculator.demo --verl --run-dir $(or $(RUN_DIR),runs/demo-verl)

test: setup
	$(PYTEST) -n $(if $(CI),3,auto) --maxprocesses 4 $(SPREAD) $(FAST) $(call again,$(FAST))

# Ray needs a machine that is not busy to start.
test-verl: setup verl
	$(BIN)/python -m pytest -m verl

test-all: test setup-crewai vllm ops
	$(CREWAI)/python -m pytest tests/frameworks/test_crewai_crew.py
	$(PYTEST) -n 2 $(SPREAD) $(SLOW) $(call again,$(SLOW))
	$(PYTEST) $(VLLM) $(call again,$(VLLM))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy -p millstream

bench: setup
	$(BIN)/python benchmarks/pipeline.py

# Kills, freezes, refuses and poisons everything, and has the log checked: 200 faults take about 15 minutes.
chaos: setup
	$(BIN)/python tests/chaos/harness.py --kills $(or $(KILLS),200) --seed $(or $(SEED),1) --run-dir $(or $(RUN_DIR),runs/chaos)

clean:
	rm -rf .venv .venv-uv .venv-crewai .venv-ops .npm-ops runs dist
