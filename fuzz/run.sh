#!/bin/sh
# Runs one fuzz target for some seconds on stable Rust: fuzz/run.sh TARGET SECONDS [libFuzzer options]
# What it found lies in fuzz/artifacts/TARGET afterwards. See README.md beside this file.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 TARGET SECONDS [libFuzzer options]" >&2
    echo "targets: $(cd "$(dirname "$0")/fuzz_targets" && ls | sed 's/\.rs$//' | tr '\n' ' ')" >&2
    exit 2
fi
target=$1 seconds=$2
shift 2
cd "$(dirname "$0")"

triple=$(rustc -vV | sed -n 's/^host: //p')
# SanitizerCoverage as cargo-fuzz sets it up, but without a sanitizer: those need nightly. The flags go to --target
# builds only, or build scripts would be instrumented too and fail to link.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 ${RUSTFLAGS:-}"
RUSTFLAGS=$(echo "$RUSTFLAGS" | tr -s ' \n' ' ')
export RUSTFLAGS
# Not the main build's directory: the flags differ, and each build would throw the other's away.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/fuzz"

cargo build --release --target "$triple" --bin "$target"
mkdir -p "corpus/$target" "artifacts/$target" "seeds/$target"
exec "$CARGO_TARGET_DIR/$triple/release/$target" "corpus/$target" "seeds/$target" \
    -artifact_prefix="artifacts/$target/" -max_total_time="$seconds" -timeout=120 -print_final_stats=1 "$@"
