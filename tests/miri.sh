#!/usr/bin/env bash
# The unit tests of the unsafe floor and of frames under miri, which sees accesses that are undefined though they work.
# Needs a nightly toolchain (NIGHTLY names it) with rustup's miri component; without one it says so and fails, or with
# --if-there says so and does not.
set -euo pipefail
cd "$(dirname "$0")/.."
nightly=${NIGHTLY:-nightly}
if ! cargo "+$nightly" miri --version >/dev/null 2>&1; then
    echo "MIRI DID NOT RUN: there is no toolchain '$nightly' with it (rustup toolchain install $nightly --component miri)" >&2
    [ "${1:-}" = --if-there ]
    exit
fi
exec cargo "+$nightly" miri test --lib -- ring:: mem:: frame::
