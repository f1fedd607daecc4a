# The commands of this project. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install what tests and demo need (apt-get), as far as it is missing
	tests/setup

build: ## build the library
	cargo build --release

header: ## make include/vmbed.h anew from src/capi
	VMBED_UPDATE_HEADER=1 cargo test --quiet --test header the_header_is_up_to_date

abi: ## take what was added to the C ABI into its baseline, tests/c/abi
	VMBED_UPDATE_ABI=1 cargo test --quiet --test c abi_is_compatible

PREFIX ?= /usr/local
# `make install PROFILE=debug` is for tests.
PROFILE ?= release
version := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
built := $(or $(CARGO_TARGET_DIR),target)/$(PROFILE)
stage := $(DESTDIR)$(PREFIX)

install: ## header, libvmbed.so, libvmbed.a and vmbed.pc into $(DESTDIR)$(PREFIX)
ifeq ($(PROFILE),release)
	cargo rustc --release --lib --crate-type staticlib
	cargo rustc --release --lib --crate-type cdylib
else
	cargo build --lib
endif
	install -d "$(stage)/include" "$(stage)/lib/pkgconfig"
	install -m 644 include/vmbed.h "$(stage)/include/vmbed.h"
	install -m 755 $(if $(filter release,$(PROFILE)),-s) "$(built)/libvmbed.so" "$(stage)/lib/libvmbed.so.$(version)"
	ln -sf libvmbed.so.$(version) "$(stage)/lib/libvmbed.so.0"
	ln -sf libvmbed.so.0 "$(stage)/lib/libvmbed.so"
	install -m 644 "$(built)/libvmbed.a" "$(stage)/lib/libvmbed.a"
	sed 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(version)|' vmbed.pc.in >"$(stage)/lib/pkgconfig/vmbed.pc"

demo: ## boot a stock Debian with disk and network, and show what it does
	tests/demo/run

demo-overcommit: ## guests with twice the memory of their machine, in the lab: what vmbed does about it
	tests/demo/overcommit

demo-net: ## four stock Debian kernels on bridges with VLANs, behind NAT, and on the switch inside: who reaches whom
	tests/demo/net

lab: ## run one command on a real KVM with nested paging: make lab CMD='...'
	@test -n "$(CMD)" || { echo "make lab: say which command: make lab CMD='uname -a'"; exit 2; }
	@tests/lab/run -- bash -c '$(subst ','\'',$(CMD))'

lint: ## formatting, clippy with warnings denied, shellcheck
	cargo fmt --check
	cargo clippy --all-targets --features serde,internals -- -D warnings
	cargo clippy --lib -- -D warnings
	shellcheck -x tests/setup tests/lab/run tests/lab/place tests/lab/here-or-lab tests/lab/selftest tests/assets/fetch \
		tests/assets/busybox-initrd tests/assets/disk-tools tests/assets/disk-exercise tests/assets/soak-guest tests/assets/net-exercise tests/assets/debian-root tests/demo/run tests/demo/inside tests/demo/overcommit tests/demo/net tests/demo/net-inside tests/stranger/run tests/placement/run benches/figures/run benches/figures/inside fuzz/run tests/hostile/mutants/run .ci/run
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet

test: setup lint ## everything that must pass, 30 to 50 minutes on 2 cores
	cargo test --features serde,internals --lib --examples --tests
	cargo test --features serde,internals --doc
	$(MAKE) models
	tests/stranger/run

models: ## where threads meet, in every order of theirs (loom); VMBED_PREEMPTIONS=1 for more of them
	cargo run --features serde,internals --example models

miri := cargo +nightly miri
# By parts of their names.
miri-tests := budget:: units:: config:: error:: rate:: bus:: ioapic:: irq:: pci:: legacy:: memory::layout:: \
	net::ether:: net::packet:: net::offload:: net::switch::guard:: net::switch::options:: net::switch::pcapng:: \
	net::switch::statistics:: net::switch::table:: virtio::net::filter:: virtio::net::header:: virtio::queue:: \
	boot::acpi::tests::every_table capi::arguments:: capi::calls:: capi::library:: capi::traffic::
# Not by chance: of these, one is named like another, and one needs a signal.
miri-skips := virtio::transport::pci sys::sigbus
miri: ## Miri over the ledger, frames, the C ABI's conversions, queues in guest memory and other code without system calls; needs a nightly with it
	@$(miri) --version >/dev/null 2>&1 || { echo "no Miri here: rustup toolchain install nightly --profile minimal -c miri,rust-src"; exit 1; }
	@echo "Miri goes through: $(miri-tests)"
	PROPTEST_CASES=4 MIRIFLAGS=-Zmiri-disable-isolation $(miri) test --no-default-features --target-dir target/miri --lib -- \
		$(miri-tests) $(addprefix --skip ,$(miri-skips))

test-all: test ## and the long forms
	VMBED_ROUNDS=100000 cargo test --features serde,internals --test c -- handles_from
	VMBED_ROUNDS=10000 cargo test --features serde,internals --test api -- handles_from
	for suite in c api; do VMBED_ROUNDS=5000 cargo test --features serde,internals --test $$suite -- stop_races; done
	VMBED_CUTS=200 cargo test --features serde,internals --test powercut
	VMBED_DISKS=all VMBED_CUTS=20 VMBED_TRIAL_SECONDS=3000 cargo test --features serde,internals --test linux -- disks::
	VMBED_VHOST=1 VMBED_TRIAL_SECONDS=900 cargo test --features serde,internals --test linux -- vhost::
	VMBED_NET_SECONDS=60 VMBED_TRIAL_SECONDS=1500 cargo test --features serde,internals --test linux -- net::streams
	VMBED_STEPS=1000000 cargo test --features serde,internals --lib every_step
	VMBED_FAULTS=all cargo test --features serde,internals --test faults
	VMBED_PREEMPTIONS=1 $(MAKE) models
	if $(miri) --version >/dev/null 2>&1; then $(MAKE) miri; else echo "make miri was left out: this machine's nightly has none"; fi
	tests/lab/selftest
	tests/placement/run

soak: setup ## what takes hours if it is to mean something: eight guests for an hour beside hostile ones, 10,000 lives, 1,000 reboots, a hundred storms, ten minutes of full traffic; the whole fault sweep, models with a preemption more, all mutants, ten minutes of each fuzz target
	VMBED_CYCLES=10000 VMBED_REBOOTS=1000 cargo test --features serde,internals --test cycles -- leave_nothing
	# In four parts: the lab's emulator stands still now and then, which costs one of them.
	for part in 1 2 3 4; do VMBED_SOAK_SECONDS=900 VMBED_TRIAL_SECONDS=2400 cargo test --features serde,internals --test linux -- soak::guests; done
	VMBED_REBOOTS=50 VMBED_TRIAL_SECONDS=3000 cargo test --features serde,internals --test linux -- soak::stock
	VMBED_STORMS=50 VMBED_TRIAL_SECONDS=3000 cargo test --features serde,internals --test linux -- storm::
	VMBED_NET_SECONDS=600 VMBED_TRIAL_SECONDS=1500 cargo test --features serde,internals --test linux -- net::full_traffic
	VMBED_FAULTS=all cargo test --features serde,internals --test faults
	VMBED_PREEMPTIONS=1 $(MAKE) models
	$(MAKE) mutants
	$(MAKE) fuzz SECONDS=600

SECONDS ?= 60
fuzz: setup ## every fuzz target for SECONDS=60 seconds: executions, coverage, and how deep it went
	fuzz/run $(SECONDS)

mutants: setup ## take each defence against hostile input out in turn: its test must fail
	tests/hostile/mutants/run

bench: setup ## measure, print each figure with its limit, fail beyond one
	cargo bench --features internals
	benches/figures/run

.PHONY: fuzz models miri mutants soak help setup build header abi install demo demo-overcommit demo-net lab lint test test-all bench
