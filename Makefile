# Everything here works on one machine: `make setup` finds or installs what is missing, and asks nothing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-checks setup-tests demo dev test bench soak chaos hostile fuzz release reproducible lint lint-rust lint-deny lint-jobs lint-shell

# How often `make soak` repeats the integration tests, and how many rounds `make bench` runs.
soak: N ?= 20
bench: N ?= 10

# How long `make chaos` makes trouble, how many jobs `make hostile` harms, and by which schedule.
chaos: MINUTES ?= 30
hostile: RUNS ?= 1000
# How many seconds `make fuzz` gives each target, and which.
fuzz: SECONDS ?= 60
fuzz: TARGETS ?= $(notdir $(basename $(wildcard fuzz/fuzz_targets/*.rs)))
# Where cargo-deny cannot be had, `make lint DENY=off` does without, and so does `make test DENY=off`.
DENY ?= on
chaos hostile: SEED ?= $(shell echo $$RANDOM)

# What a test says when it fails is worth more than where in the runtime it was.
test soak chaos hostile: export RUST_BACKTRACE := 0

# Integration tests wait for Nomad and the engine more than they work.
test soak: export RUST_TEST_THREADS ?= $(shell echo $$((6 * $$(nproc))))

# What set-up found: the engine's address, Nomad, the registry.
with_env := set -a; . target/setup.env; set +a;
shell_scripts := .ci/run tools/setup tools/demo tools/base-image tools/bench tools/release

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Find or install git, a Docker Engine, a registry and Nomad
	@tools/setup

setup-checks: setup
	@tools/setup checks

setup-tests: setup
	@tools/setup tests

demo: setup ## Build, test and publish a sample repository on a stack of its own, then stop it
	@tools/demo

dev: setup ## Leave a stack up in the foreground: Nomad, a registry and the service (Ctrl-C stops it)
	@cargo build --release --locked
	@$(with_env) exec target/release/nomad-build dev

test: setup-tests lint ## All checks and all tests, over a real Nomad, Docker Engine and registry
	@$(with_env) cargo test --locked --all-features

bench: setup ## Measure end to end, submit and status against their bare counterparts: make bench N=10
	@$(with_env) tools/bench $(N)

soak: setup-tests ## Repeat the integration tests: make soak N=20
	@$(with_env) cargo test --locked --all-features --test it --no-run
	@$(with_env) for run in $$(seq $(N)); do \
	    echo "== soak: run $$run of $(N)"; \
	    cargo test --locked --all-features --test it || { echo "soak: run $$run of $(N) failed" >&2; exit 1; }; \
	done; echo "soak: all $(N) runs are green"

chaos: setup ## Jobs under a load while everything fails, then their histories are checked: make chaos MINUTES=30 SEED=7
	@$(with_env) NOMAD_BUILD_TEST_CHAOS_SECONDS=$$((60 * $(MINUTES))) NOMAD_BUILD_TEST_CHAOS_SEED=$(SEED) \
	    cargo test --locked --all-features --test it -- --nocapture chaos::whatever_fails

hostile: setup ## Harm jobs while they publish, then their histories are checked: make hostile RUNS=1000 SEED=7
	@$(with_env) NOMAD_BUILD_TEST_HOSTILE_RUNS=$(RUNS) NOMAD_BUILD_TEST_CHAOS_SEED=$(SEED) \
	    cargo test --locked --all-features --test it -- --nocapture chaos::whatever_is_done

# Safe code needs no sanitizer, and without one the stable compiler does.
fuzz: ## Made-up input for what strangers' bytes go through: make fuzz SECONDS=600 TARGETS="mask log"
	@tools/setup fuzz
	@PATH=$$PATH:$${XDG_CACHE_HOME:-$$HOME/.cache}/nomad-build/bin; for target in $(TARGETS); do \
	    echo "== fuzz: $$target, $(SECONDS) s"; mkdir -p fuzz/corpus/$$target; \
	    cargo fuzz run --sanitizer none $$target fuzz/corpus/$$target tests/corpus/$$target -- \
	        -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=2048 -max_len=4096 -print_final_stats=1 || exit 1; \
	done; echo "fuzz: nothing was found"

release: ## Build a release into target/dist: the program, its bill of materials and their checksums
	@tools/release

reproducible: ## Build a release of the commit twice, in two places, and compare
	@tools/release check

lint: setup-checks lint-rust lint-deny lint-jobs lint-shell ## Formatting, clippy, licences, job files, shell scripts

lint-rust:
	@cargo fmt --check
	@cargo clippy --locked --all-targets --all-features -- -D warnings

# A check that could not be made has found nothing, and is not passed. Advisories need a database from outside: where it cannot be
# had, that part is skipped and said so.
lint-deny:
	@$(with_env) PATH=$$PATH:$$NOMAD_BUILD_TOOLS; if [ "$(DENY)" = off ]; then \
	    echo "lint: DENY=off, licences, sources and advisories are not checked"; \
	elif ! command -v cargo-deny >/dev/null; then \
	    echo "lint: cargo-deny is not installed: make setup-checks installs it, DENY=off does without" >&2; exit 1; \
	else \
	    deny() { for of in Cargo.toml fuzz/Cargo.toml; do \
	        cargo deny --locked --manifest-path $$of --config deny.toml check --hide-inclusion-graph "$$@"; done; }; \
	    deny licenses bans sources; \
	    if cargo deny --locked fetch db >/dev/null 2>&1; then deny advisories; \
	    else echo "lint: the advisory database cannot be fetched, advisories are not checked"; fi; \
	fi

lint-jobs: setup
	@$(with_env) "$$NOMAD_BUILD_NOMAD" fmt -check -list nomad-jobs

lint-shell:
	@for script in $(shell_scripts); do [ ! -e "$$script" ] || bash -n "$$script"; done
	@if command -v shellcheck >/dev/null; then shellcheck $(wildcard $(shell_scripts)); \
	else echo "lint: shellcheck is not installed, only the syntax of the scripts is checked"; fi
