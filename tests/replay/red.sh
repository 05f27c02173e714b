#!/usr/bin/env bash
# Shows that the tests of tests/replay can fail: builds a copy of the tree with weakened.patch, by which the environment
# variable LINECARD_WEAKENED takes out one check, wants all tests to pass without it, and then those whose names begin with
# each name in turn (or with each one of the command line) to fail. The copy and its build are in target/replay.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# -eq 0 ]; then
    # shellcheck disable=SC2046
    set -- $(sed -n 's/.*weakened("\([a-z0-9_]*\)").*/\1/p' tests/replay/weakened.patch | sort -u)
fi
copy=$PWD/target/replay/tree
rm -rf "$copy"
mkdir -p "$copy"
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -c | tar -x -C "$copy"
patch -s -p1 -d "$copy" <tests/replay/weakened.patch
cd "$copy"
export CARGO_TARGET_DIR=$copy/../build
export RUST_BACKTRACE=0
log=$copy/../log
replay() {
    # The patch itself no longer fits the copy.
    cargo test -q --test replay -- --skip weakenings:: "$@" >"$log" 2>&1
}

cargo test -q --test replay --no-run
replay || { cat "$log"; exit 1; }
echo "with every check in place all tests pass"
failed=0
for name; do
    if LINECARD_WEAKENED=$name replay "$name"; then
        echo "$name: PASSES though its check is taken out"
        failed=1
    elif grep -q '^test result: FAILED' "$log"; then
        echo "$name fails: $(grep -A1 -m1 ' panicked at ' "$log" | tail -n1 | cut -c1-120)"
    else
        cat "$log"
        exit 1
    fi
done
exit $failed
