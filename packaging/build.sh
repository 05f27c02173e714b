#!/bin/sh
# Builds target/package: the binaries, their man pages and completions, and of them a .deb and an .rpm. See README.md
# beside this file. Usage: packaging/build.sh [deb] [rpm]
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- deb rpm
for kind in "$@"; do
    case $kind in
    deb) tool=cargo-deb ;;
    rpm) tool=cargo-generate-rpm ;;
    *) echo "usage: $0 [deb] [rpm]" >&2 && exit 2 ;;
    esac
    command -v "$tool" >/dev/null || { echo "$0: $tool is missing: cargo install --locked $tool" >&2 && exit 1; }
done

# The metadata in Cargo.toml says target/release and target/package, so nothing else will do.
export CARGO_TARGET_DIR="$PWD/target"
out=target/package
cargo build --release --locked --bins
rm -rf "$out"
mkdir -p "$out/man" "$out/completion"
target/release/linecard man "$out/man"
gzip -9n "$out"/man/*
for shell in bash zsh fish; do
    target/release/linecard completion "$shell" >"$out/completion/$shell"
done
for kind in "$@"; do
    case $kind in
    deb) cargo deb --no-build --output "$out/" ;;
    rpm) cargo generate-rpm --output "$out/" ;;
    esac
done
ls "$out"/*.deb "$out"/*.rpm 2>/dev/null
