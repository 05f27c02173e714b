#!/usr/bin/env bash
# Linecard beside Open vSwitch with DPDK, one core each in turn, the same load: DPDK's testpmd with two virtio-user NICs, A
# and B, that bounce frames to each other through the switch, unicast by MAC. Every frame crosses the switch once per
# bounce, so millions of frames per second that A and B receive together are what the switch forwarded.
#
# The machines this runs on are noisy, so the two switches take turns (A B A B ...) and the ratio of each turn counts;
# printed are the median and the spread.
#
# usage: benches/pair.sh [-l "64 512 1514"] [-t SECONDS] [-r ROUNDS] [-o VIRTIO_OPTIONS] [-s SWITCH_CPU] [-g GENERATOR_CPU]
#   -o   for both NICs, e.g. packed_vq=1 or mrg_rxbuf=0
# needs: dpdk, openvswitch-switch-dpdk (qemu-tests/setup.sh all), root, 1.2 GiB of memory for 2 MiB huge pages, two CPUs
set -euo pipefail
cd "$(dirname "$0")/.."
LENGTHS="64 512 1514" SECS=4 ROUNDS=5 OPTIONS= SWITCH=0 GENERATOR=1
while getopts l:t:r:o:s:g: option; do
  case $option in
    l) LENGTHS=$OPTARG ;; t) SECS=$OPTARG ;; r) ROUNDS=$OPTARG ;; o) OPTIONS=,$OPTARG ;;
    s) SWITCH=$OPTARG ;; g) GENERATOR=$OPTARG ;; *) exit 2 ;;
  esac
done
BIN=${CARGO_TARGET_DIR:-target}/release
DIR=$(mktemp -d)
PAGES=/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
PAGES_BEFORE=$(cat $PAGES)
PIDS=()

cleanup() {
  for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null || true; done
  for file in "$DIR"/ovs/*.pid; do [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true; done
  sleep 0.5
  echo "$PAGES_BEFORE" >$PAGES
  rm -rf "$DIR"
}
trap cleanup EXIT

# 512 MiB for the generator, 512 for Open vSwitch, some to spare.
[ "$PAGES_BEFORE" -ge 560 ] || echo 560 >$PAGES
[ "$(cat $PAGES)" -ge 560 ] || { echo "cannot reserve 560 huge pages of 2 MiB: free some memory" >&2; exit 1; }

# generator SOCKET_A SOCKET_B LENGTH [server]: prints millions of frames per second
generator() {
  local server=${4:+,server=1} out=$DIR/testpmd.log
  : >"$out"
  # Both NICs are connected when testpmd looks at their links; the switch then needs a moment to serve them.
  { for _ in $(seq 200); do grep -q "Checking link" "$out" && break; sleep 0.1; done; sleep 1.5; echo "set txpkts $3"; echo "start tx_first 32"; sleep 1
    echo "clear port stats all"; echo "show port stats all"; sleep "$SECS"; echo "show port stats all"
    [ -z "${5:-}" ] || $5 >&2
    echo stop; sleep 0.3; echo quit; } |
  dpdk-testpmd --lcores "0@$GENERATOR,1@$GENERATOR" -m 512 --in-memory --single-file-segments --no-pci --file-prefix "pair$$" \
    --vdev "net_virtio_user0,mac=02:00:00:00:00:01,path=$1,queue_size=1024$server$OPTIONS" \
    --vdev "net_virtio_user1,mac=02:00:00:00:00:02,path=$2,queue_size=1024$server$OPTIONS" \
    -- -i --nb-cores=1 --forward-mode=mac --eth-peer=0,02:00:00:00:00:02 --eth-peer=1,02:00:00:00:00:01 \
    --txd=1024 --rxd=1024 --total-num-mbufs=65536 --no-flush-rx >"$out" 2>&1 || { cat "$out" >&2; return 1; }
  grep Rx-pps "$out" | tail -2 | awk '{sum += $2} END {printf "%.2f\n", sum / 1e6}'
}

shard_report() { "$BIN/linecard" --api "$DIR/api.sock" -o json shard list >"$DIR/shards.json"; }

# linecard LENGTH: prints "Mpps cycles-per-frame busy%"
linecard() {
  cat >"$DIR/linecard.yaml" <<YAML
version: 1
daemon: { api: $DIR/api.sock, state-dir: $DIR/state }
shards: { cpus: "$SWITCH", idle: never }
networks: { lan: {} }
ports:
  a: { vhost-user: { socket: $DIR/a.sock }, network: lan }
  b: { vhost-user: { socket: $DIR/b.sock }, network: lan }
YAML
  "$BIN/linecardd" --config "$DIR/linecard.yaml" 2>"$DIR/linecardd.log" &
  local pid=$! mpps
  PIDS=("$pid")
  for _ in $(seq 100); do [ -S "$DIR/b.sock" ] && break; sleep 0.05; done
  mpps=$(generator "$DIR/a.sock" "$DIR/b.sock" "$1" "" shard_report) || { cat "$DIR/linecardd.log" >&2; return 1; }
  kill "$pid"; wait "$pid" || true
  PIDS=()
  local cycles busy
  cycles=$(grep -o '"cycles-per-frame": *[0-9.]*' "$DIR/shards.json" | grep -o '[0-9.]*$' | xargs printf "%.0f" || echo -)
  busy=$(grep -o '"busy-percent": *[0-9.]*' "$DIR/shards.json" | grep -o '[0-9.]*$' | xargs printf "%.0f%%" || echo -)
  echo "$mpps $cycles $busy"
}

# ovs LENGTH: prints "Mpps"
ovs() {
  local dir=$DIR/ovs db=unix:$DIR/ovs/db.sock mask
  mask=$(printf '0x%x' $((1 << SWITCH)))
  mkdir -p "$dir"; rm -f "$dir"/*
  export OVS_RUNDIR=$dir OVS_LOGDIR=$dir OVS_DBDIR=$dir
  ovsdb-tool create "$dir/conf.db" /usr/share/openvswitch/vswitch.ovsschema
  ovsdb-server --remote=punix:"$dir/db.sock" --pidfile="$dir/ovsdb.pid" --detach --log-file="$dir/ovsdb.log" "$dir/conf.db" 2>/dev/null
  ovs-vsctl --db="$db" --no-wait init
  ovs-vsctl --db="$db" --no-wait set Open_vSwitch . other_config:dpdk-init=true other_config:dpdk-socket-mem=512 \
    other_config:pmd-cpu-mask="$mask" other_config:dpdk-lcore-mask="$mask" other_config:dpdk-extra="--in-memory --no-pci"
  # The plain ovs-vswitchd of Debian's package has no DPDK in it.
  /usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk --pidfile="$dir/vswitchd.pid" --unixctl="$dir/ctl" --detach \
    --log-file="$dir/vswitchd.log" "$db" >/dev/null 2>&1
  ovs-vsctl --db="$db" add-br br0 -- set bridge br0 datapath_type=netdev
  for port in a b; do
    ovs-vsctl --db="$db" add-port br0 "v$port" -- set Interface "v$port" type=dpdkvhostuserclient \
      options:vhost-server-path="$dir/$port.sock"
  done
  generator "$dir/a.sock" "$dir/b.sock" "$1" server
  kill "$(cat "$dir/vswitchd.pid")" "$(cat "$dir/ovsdb.pid")"
  while [ -e "$dir/vswitchd.pid" ]; do sleep 0.1; done
}

# stats: of numbers on standard input: "median (min to max)"
stats() { sort -n | awk '{v[NR] = $1} END {printf "%.2f (%.2f to %.2f)", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2, v[1], v[NR]}'; }

printf '%-6s %-26s %-18s %-26s %s\n' bytes "Linecard Mpps" "cycles  busy" "Open vSwitch Mpps" "ratio, per turn"
for length in $LENGTHS; do
  : >"$DIR/ours" >"$DIR/theirs" >"$DIR/ratio" >"$DIR/cycles"
  for _ in $(seq "$ROUNDS"); do
    ours=$(linecard "$length"); theirs=$(ovs "$length")
    echo "${ours%% *}" >>"$DIR/ours"; echo "${ours#* }" >>"$DIR/cycles"; echo "$theirs" >>"$DIR/theirs"
    awk -v a="${ours%% *}" -v b="$theirs" 'BEGIN {print a / b}' >>"$DIR/ratio"
  done
  printf '%-6s %-26s %-18s %-26s %s\n' "$length" "$(stats <"$DIR/ours")" "$(sort -n "$DIR/cycles" | sed -n "$(((ROUNDS + 1) / 2))p")" \
    "$(stats <"$DIR/theirs")" "$(stats <"$DIR/ratio")"
done
