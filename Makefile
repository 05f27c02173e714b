# Linecard: what people type. Each target installs what it needs on Debian 12 or 13 (as root, or through sudo), except
# `check`, which needs the Rust toolchain only.

CARGO ?= cargo
SETUP := qemu-tests/setup.sh

.PHONY: demo run test check build bench fuzz loom miri steady replay-red clean

# Two QEMU guests talk through linecardd; leaves nothing behind.
demo:
	$(SETUP) guests
	$(CARGO) build --release --workspace --bins
	./target/release/demo

# The daemon alone, with configs/quickstart.yaml; Ctrl-C ends it.
run: build
	mkdir -p -m 711 /run/linecard
	./target/release/linecardd --config configs/quickstart.yaml

build:
	$(CARGO) build --release --bins

# Every test there is: unit, property, hostile, protocol, DPDK, QEMU guests.
test:
	$(SETUP) all
	$(CARGO) build --release --workspace --bins
	LINECARD_BIN_DIR=$(CURDIR)/target/release $(CARGO) test --workspace
	$(CARGO) test --test frontend_selftest -- --ignored

# Formatting, lints, documentation; advisories and licences where cargo-deny is installed.
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --no-deps --workspace --document-private-items --quiet
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check || exit 1; \
	else echo "cargo-deny is not installed: advisories and licences were not checked (cargo install cargo-deny)"; fi

# Every row of docs/performance.md beside Open vSwitch with DPDK and testpmd, into docs/bench; then testpmd as the generator.
# About an hour; SHORT=1: some minutes, into target/bench. One group at a time: docs/performance.md. Needs 2 MiB huge pages,
# which it takes and gives back, and a quiet machine.
bench:
	$(SETUP) all
	$(CARGO) build --release --bins --workspace
	./target/release/generator bench $(if $(SHORT),--short)
	benches/pair.sh $(if $(SHORT),-l 64 -t 2 -r 1)

# Each fuzz target of TARGETS (default: all) for SECONDS (default 30). What they came to is kept with fuzz/keep.sh.
fuzz:
	for target in $(or $(TARGETS),ethernet ring packed control yaml offload); do fuzz/run.sh $$target $(or $(SECONDS),30) || exit 1; done

# What shards share without locks, in every interleaving that the memory model allows.
loom:
	$(CARGO) test --release --manifest-path tests/loom/Cargo.toml --target-dir target/loom

# The unit tests of the unsafe floor under miri, which needs a nightly toolchain with that component (NIGHTLY=name).
miri:
	tests/miri.sh

# The suites that have to do with time, ROUNDS times (default 10) beside a busy loop on each CPU.
steady:
	tests/steady.sh

# Each test of tests/replay must fail on a build whose check is taken out. NAMES="..." for some of them.
replay-red:
	tests/replay/red.sh $(NAMES)

clean:
	$(CARGO) clean
