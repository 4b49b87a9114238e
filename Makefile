# Every target sets up what it needs. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TINY := .kvfarm/checkpoints/tiny-gemma3
BIG := .kvfarm/checkpoints/gemma-3-1b
REPORT := out/report
# Without it every process of ours would compile everything anew, and pytest rewrite every assertion.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv farm test lint docs apt soak soak-faults soak-programs soak-fuzz soak-hosts chaos mutants bench scale clean
help:
	@echo "make farm   check and measure the demo model on this host and three virtual phones, write $(REPORT)/index.html"
	@echo "make test   the project's own tests"
	@echo "make lint   ruff and strict mypy"
	@echo "make soak   every fault 20 times (15 minutes), then the same properties with many more programs"
	@echo "make chaos  kills, full disks and cut networks at random, 300 rounds (15 minutes): every result once, no device stuck"
	@echo "make mutants  the correctness suite against every known cache bug, and 10,000 programs without"
	@echo "make bench  speed against onnxruntime-genai"
	@echo "make scale  what 1,000 simulated devices cost, and how much sooner four phones are done than one"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing kvfarm and its dependencies into $(VENV) (about a minute)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

$(TINY): $(STAMP)
	$(BIN)/kvfarm synth tiny-gemma3 -o $(TINY)

$(BIG): $(STAMP)
	$(BIN)/kvfarm synth gemma-3-1b -o $(BIG)

# Phones where this machine allows them; what is in the way is printed where it does not.
farm: $(TINY) $(BIG)
	devices=host; if $(BIN)/kvfarm phones possible; then devices=farm; fi; \
	  $(BIN)/pytest --farm=docs/farm.toml --devices=$$devices --model=$(TINY) --measure=$(BIG)=int4@host \
	  --examples=10 --repeats=3 --new-tokens=32 --report=$(REPORT)
	@echo "open $(REPORT)/index.html"

# Chromium opens the report, qemu runs the arm64 bundle in tests/e2e, PostgreSQL keeps a store in tests; the
# rest comes from constraints.txt. Debian has initdb off PATH.
apt:
	@command -v chromium >/dev/null && command -v qemu-aarch64-static >/dev/null && \
	  { command -v initdb || ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq chromium qemu-user-static zstd postgresql; } >/dev/null

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint apt
	KVFARM_POSTGRES=required $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests

docs: $(STAMP)
	$(BIN)/python docs/generate_cli.py

soak: soak-faults soak-programs soak-fuzz

# Every fault 20 times against virtual phones at work; then links frozen for as long as real ones are.
soak-faults: $(STAMP)
	$(BIN)/python -m tests.soak --times 20
	$(BIN)/python -m tests.soak --times 2 --real-freezes --json out/soak-freezes.json

soak-programs: $(TINY)
	$(BIN)/pytest --devices=host --model $(TINY) --examples 1000 --report out/soak

soak-fuzz: $(STAMP)
	KVFARM_FUZZ=soak $(BIN)/pytest tests/device_agents/test_fuzz_frames.py tests/device_agents/test_hostile_graph.py \
	  tests/kvengine/test_hostile_models.py
	KVFARM_FUZZ=10000 $(BIN)/pytest tests/kvengine/test_fuzz.py

# A head and two hosts in namespaces: cut off, killed, drained, the head started again. Needs root.
soak-hosts: $(STAMP)
	$(BIN)/python -m tests.cluster_lab

chaos: $(STAMP) apt
	$(BIN)/python -m tests.chaos

mutants: $(STAMP)
	$(BIN)/kvfarm mutants --programs 10000

bench: $(BIG)
	$(BIN)/python -m bench.genai --model $(BIG)

# 15 minutes: 1,000 simulated devices, then four virtual phones beside one.
scale: $(STAMP)
	$(BIN)/python -m bench.scale --plot docs/scale.svg
	$(BIN)/python -m bench.parallel

clean:
	rm -rf out .kvfarm
