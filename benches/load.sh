#!/usr/bin/env bash
# One load against one or several switches in turn, from virtio-net drivers that touch no frame, so that the switch is the
# limit at any size: prints Mpps, the switch's cycles per frame and busy share, and the generator's own.
#
# usage: benches/load.sh [-w linecard,ovs,cable] [-l 64,512,1514,imix] [-t SECONDS] [-r ROUNDS] [-n PORTS] [-q QUEUES]
#                        [-m STATIONS] [--packed] [--habit rewrite] …       (--help lists all)
# needs: root, two CPUs, memory for 2 MiB huge pages (taken and given back); for ovs and cable qemu-tests/setup.sh all
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --quiet --release --bins --package linecard --package generator
BIN=${CARGO_TARGET_DIR:-target}/release
exec "$BIN/generator" load --bin-dir "$BIN" "$@"
