# Headlight. `make` lists the targets; each sets up what it needs first (tools/setup.sh).

PYTHON := build/venv/bin/python
SETUP  := sh tools/setup.sh
JOBS   ?= 2
COUNT  ?= 500
SEED   ?= 1

# The header of `make demo`: DeepSeek's shape, 512 channels and 64 more with the position.
DEMO      := build/demo
DEMO_NAME := hl_sparse_flash_attention_bf16_d512_rope64
DEMO_SPEC := --op sparse_flash_attention --dtype bf16 --dk 512 --rope 64

.DEFAULT_GOAL := help
.PHONY: help demo demo-embedded test guard check bench bench-peers examples headers clean determinism compilers accuracy fuzz sanitize analyse coverage wide mutate
REPEATS   ?= 1000

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: ## generate a header, compile the example against it, run a decode step on .npy files
	@$(SETUP) python cc
	@mkdir -p $(DEMO)
	$(PYTHON) -m gen header $(DEMO_SPEC) -o $(DEMO)/$(DEMO_NAME).h
	$(PYTHON) examples/make_npy.py $(DEMO)
	cc -O2 -I$(DEMO) examples/decode_npy.c -o $(DEMO)/decode_npy -lm
	$(DEMO)/decode_npy $(DEMO)

demo-embedded: ## the same in small, as firmware for a Cortex-M4F under qemu
	@$(SETUP) python cc arm
	$(PYTHON) examples/embedded/run.py

test: ## all tests, the examples, the firmware
	@$(SETUP) python cc cxx sleef arm64 arm wide lint fuzz analyse
	$(PYTHON) -m pytest tests -n $(JOBS) --dist loadfile

guard: ## every shipped header between pages that may not be touched: the whole sweep, with counts
	@$(SETUP) python cc cxx sleef arm64
	@rm -rf build/guard
	HEADLIGHT_GUARD=full $(PYTHON) -m pytest tests/test_guard*.py -n $(JOBS) --dist worksteal
	@PYTHONPATH=.:tests $(PYTHON) tests/helpers_guard.py

wide: ## every header on 32-bit x86 and Arm and on big-endian s390x (test has some of each)
	@$(SETUP) python cc wide
	HEADLIGHT_WIDE=all $(PYTHON) -m pytest tests/test_wide.py -n $(JOBS)

check: ## what must hold of the product: same bytes, strict compiles, names, stack, linters
	@$(SETUP) python cc cxx arm64 arm lint
	@$(PYTHON) tests/check.py --jobs $(JOBS)

determinism: ## the same bits whatever is around a row: REPEATS (1000) of every kernel; an hour
	@$(SETUP) python cc arm64
	$(PYTHON) tests/repeats.py --repeats $(REPEATS)

compilers: ## the same bits from every compiler, level, standard and contraction; hours
	@$(SETUP) python cc arm64 lint compilers
	$(PYTHON) tests/compilers.py --fused

accuracy: ## every element within its bound, to 131072 keys, and how tight the bounds are; an hour
	@$(SETUP) python cc
	$(PYTHON) tests/accuracy.py

fuzz: ## feed every shipped header what libFuzzer makes of it, for SECONDS in all (600)
	@$(SETUP) python cc fuzz
	$(PYTHON) tests/fuzz/run.py --seconds $(or $(SECONDS),600) --jobs $(JOBS) $(FUZZ)

sanitize: ## every shipped header under ASan, UBSan, MSan, TSan and valgrind; ONLY=<part of a name>
	@$(SETUP) python cc lint analyse
	$(PYTHON) tests/sanitize.py --jobs $(JOBS) --only '$(ONLY)'

analyse: ## every shipped header through gcc -fanalyzer and scan-build
	@$(SETUP) python cc lint analyse
	$(PYTHON) tests/analyse.py --jobs $(JOBS)

coverage: ## lines, branches and MC/DC of the shipped headers; ONLY=<part|part> for some
	@$(SETUP) python cc sleef coverage
	$(PYTHON) tests/cover.py --jobs $(JOBS) --only '$(ONLY)'

mutate: ## put COUNT defects into generated headers, one at a time: which ones do tests notice?
	@$(SETUP) python cc cxx sleef arm64
	$(PYTHON) tests/mutate.py --count $(COUNT) --seed $(SEED) --jobs $(JOBS)

bench: ## time the shipped headers against this machine's own limits; ONLY=<pattern> for some
	@$(SETUP) python cc sleef
	$(PYTHON) bench/run.py --only '$(ONLY)'

bench-peers: ## the same shapes beside other libraries, which it installs (a gigabyte or more)
	@$(SETUP) python cc
	$(PYTHON) bench/peers/install.py
	$(PYTHON) bench/run.py --peers --only '$(ONLY)'

examples: ## compile every example by the line at its top, and run it
	@$(SETUP) python cc
	$(PYTHON) examples/run.py

headers: ## generate include/ from gen/catalogue.toml
	@$(SETUP) python
	$(PYTHON) -m gen all

clean: ## remove build/, with the virtual environment
	rm -rf build
