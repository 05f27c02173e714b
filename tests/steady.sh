#!/usr/bin/env bash
# The suites that have to do with time, ROUNDS times (default 10) beside a busy loop on each CPU: what passes on a quiet
# machine by luck alone does not pass here. SUITES chooses among them.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${ROUNDS:-10}
suites=${SUITES:-reconnect latency rings reload shard}

cargo test -q --no-run --test reconnect --test latency --test rings --test reload
cargo test -q --no-run --lib

hogs=()
quiet() {
    # Only what was started here, by its number.
    for pid in "${hogs[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}
trap quiet EXIT
trap 'exit 130' INT TERM
for cpu in $(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' | awk -F- '{ for (n = $1; n <= ($2 == "" ? $1 : $2); n++) print n }'); do
    taskset -c "$cpu" bash -c 'while :; do :; done' &
    hogs+=($!)
done

log=target/steady.log
failed=0
for ((round = 1; round <= rounds; round++)); do
    for suite in $suites; do
        case $suite in
        shard) tests=(--lib shard) ;;
        *) tests=(--test "$suite") ;;
        esac
        if ! RUST_BACKTRACE=0 cargo test -q "${tests[@]}" >"$log" 2>&1; then
            cat "$log"
            echo "round $round: $suite failed"
            failed=$((failed + 1))
        fi
    done
    echo "round $round of $rounds is over, $failed failures so far"
done
[ "$failed" -eq 0 ]
