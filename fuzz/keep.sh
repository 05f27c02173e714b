#!/bin/sh
# Keeps what runs of a fuzz target have come to: fuzz/keep.sh TARGET, after fuzz/run.sh TARGET SECONDS.
# Of corpus/TARGET, the smallest inputs that together reach all that the seeds with names do not become seeds/TARGET/corpus-*,
# instead of those that were there. Nothing changes if that is more than MOST bytes (default 1 MB).
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 TARGET" >&2
    exit 2
fi
target=$1
cd "$(dirname "$0")"
triple=$(rustc -vV | sed -n 's/^host: //p')
binary="${CARGO_TARGET_DIR:-$PWD/target}/fuzz/$triple/release/$target"
[ -x "$binary" ] || { echo "$binary is not there: run fuzz/run.sh $target first" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/named" "$scratch/kept"
find "seeds/$target" -type f ! -name 'corpus-*' -exec cp {} "$scratch/named/" \;
cp "$scratch/named/"* "$scratch/kept/"
"$binary" -merge=1 "$scratch/kept" "corpus/$target" "seeds/$target" >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; exit 1; }
for file in "$scratch/named/"*; do
    rm -f "$scratch/kept/$(basename "$file")"
done

bytes=$(find "$scratch/kept" -type f -exec cat {} + | wc -c)
count=$(find "$scratch/kept" -type f | wc -l)
if [ "$bytes" -gt "${MOST:-1000000}" ]; then
    echo "$target: $count inputs of $bytes bytes together are too much to keep" >&2
    exit 1
fi
find "seeds/$target" -type f -name 'corpus-*' -delete
find "$scratch/kept" -type f | while read -r file; do
    cp "$file" "seeds/$target/corpus-$(sha1sum <"$file" | cut -c1-12)"
done
echo "$target: $count inputs, $bytes bytes"
