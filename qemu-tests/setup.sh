#!/bin/bash
# Prepare this machine for the real-guest tests and the demo: Debian packages, and a kernel for the guests.
#
#   qemu-tests/setup.sh guests   what `make demo` needs: QEMU 10 and what goes into a guest
#   qemu-tests/setup.sh all      that, libvirt, and the switches and tools that tests and benches compare with (default)
#
# Runs on Debian 12 and 13 (amd64), as root or through sudo; quick when nothing is missing. Packages stay installed.
# Everything else goes to guest-kit/ in cargo's target directory; apt's own sources and lists are left as they are.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
kit=${LINECARD_KIT_DIR:-${CARGO_TARGET_DIR:-$here/../target}/guest-kit}

guests=(busybox-static dash ethtool iperf3 iproute2 iputils-ping kmod procps util-linux xz-utils zstd)
peers=(dpdk dpdk-dev openvswitch-switch-dpdk tcpdump g++)    # dpdk-dev: testpmd and drivers; g++: libFuzzer of the fuzz targets
firmware=(ipxe-qemu)
libvirt=(libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu)
toolchain=(gcc libc6-dev make)    # rustc links with cc

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

[ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] || die "needs Debian on amd64"
. /etc/os-release
case "${VERSION_CODENAME:-}" in
    bookworm) suite=bookworm-backports ;;    # Debian 12 itself has QEMU 7.2, which crashes guests under TCG
    trixie) suite=trixie ;;
    *) die "knows Debian 12 (bookworm) and 13 (trixie), this is ${PRETTY_NAME:-unknown}" ;;
esac

case "${1:-all}" in
    guests) wanted=("${guests[@]}" "${toolchain[@]}") with_qemu=() ;;
    all) wanted=("${guests[@]}" "${toolchain[@]}" "${peers[@]}" "${firmware[@]}") with_qemu=("${libvirt[@]}") ;;
    *) die "usage: setup.sh [guests|all]" ;;
esac

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "not root, and there is no sudo"
    fi
}

scratch=$(mktemp -d)
removes_policy=
tidy() {
    [ -z "$removes_policy" ] || as_root rm -f /usr/sbin/policy-rc.d
    as_root rm -rf "$scratch"
}
trap tidy EXIT

# The machine's own archive sources, one "OPTIONS|URI|SUITE COMPONENTS" per line and suite, from both formats that apt reads.
own_sources() {
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ ! -e "$file" ] || sed -nE 's/^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+)[[:space:]]+([^#]+).*$/\1|\2|\3/p' "$file"
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [ ! -e "$file" ] || awk '
            function stanza(   i, j, nu, ns, u, s, opt) {
                if (f["types"] ~ /(^| )deb( |$)/ && tolower(f["enabled"]) != "no") {
                    # A key given as a path or fingerprint fits on one line; an inline key block is left to apt'"'"'s trusted keys.
                    opt = (f["signed-by"] != "" && f["signed-by"] !~ /BEGIN PGP/) ? "[signed-by=" f["signed-by"] "] " : ""
                    nu = split(f["uris"], u, " "); ns = split(f["suites"], s, " ")
                    for (i = 1; i <= nu; i++) for (j = 1; j <= ns; j++) print opt "|" u[i] "|" s[j] " " f["components"]
                }
                delete f; key = ""
            }
            /^#/ { next }
            /^[ \t]*$/ { stanza(); next }
            /^[ \t]/ { sub(/^[ \t]+/, ""); f[key] = f[key] " " $0; next }
            { i = index($0, ":"); key = tolower(substr($0, 1, i - 1)); v = substr($0, i + 1); gsub(/^[ \t]+|[ \t\r]+$/, "", v); f[key] = v }
            END { stanza() }' "$file"
    done
}

# apt with a view of its own: only this Debian release from the machine's mirrors (a broken third-party source is no
# concern of ours), plus backports from the mirror that serves the release. `-o` settings leave /etc/apt alone.
apt_view() {
    [ ! -e "$scratch/sources.list" ] || return 0
    local options uri rest release=
    mkdir -p "$scratch/lists/partial" "$scratch/none"
    while IFS='|' read -r options uri rest; do
        case "$rest" in
            "$VERSION_CODENAME "*) echo "deb $options$uri $rest"
                [ -n "$release" ] || { release=$uri; [ "$suite" = "$VERSION_CODENAME" ] || echo "deb $options$uri $suite main"; } ;;
            "$VERSION_CODENAME-updates "* | "$VERSION_CODENAME-security "*) echo "deb $options$uri $rest" ;;
        esac
    done < <(own_sources) > "$scratch/sources.list"
    grep -q . "$scratch/sources.list" || die "no apt source of this machine names $VERSION_CODENAME"
    chmod -R go+rX "$scratch"
    view=(-o "Dir::Etc::SourceList=$scratch/sources.list" -o "Dir::Etc::SourceParts=$scratch/none" -o "Dir::State::Lists=$scratch/lists"
        -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o APT::Sandbox::User=root -o Acquire::Retries=3 -qq)
    say "reading package lists"
    as_root apt-get "${view[@]}" update
}

# No package starts a service here. A machine that has its own policy keeps it (containers usually forbid all already).
forbid_services() {
    [ ! -e /usr/sbin/policy-rc.d ] || return 0
    removes_policy=yes
    printf '#!/bin/sh\nexit 101\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
    as_root chmod 755 /usr/sbin/policy-rc.d
}

install() { # [-t SUITE] PACKAGE...
    apt_view
    forbid_services
    say "installing ${*}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get "${view[@]}" install -y --no-install-recommends "$@" >"$scratch/apt.log" 2>&1 ||
        { tail -n 20 "$scratch/apt.log" >&2; die "apt-get install failed"; }
}

missing() { # PACKAGE...
    local package
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}
mapfile -t lacking < <(missing "${wanted[@]}")
[ ${#lacking[@]} = 0 ] || install "${lacking[@]}"

qemu_version=$(dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null || true)
[ -n "$qemu_version" ] && dpkg --compare-versions "$qemu_version" ge 1:10 || install -t "$suite" qemu-system-x86

# From where QEMU comes: an older libvirt does not know what a newer QEMU can do.
mapfile -t lacking < <(missing "${with_qemu[@]}")
[ ${#lacking[@]} = 0 ] || install -t "$suite" "${lacking[@]}"

# The compressed kernel inside a bzImage starts somewhere behind the boot code: try each place that looks like it.
extract_vmlinux() { # BZIMAGE VMLINUX
    local magic unpack at
    while read -r magic unpack; do
        while IFS=: read -r at _; do
            tail -c "+$((at + 1))" "$1" | $unpack >"$2" 2>/dev/null || true    # trailing bytes always end in an error
            [ "$(head -c 4 "$2" | od -An -tx1 | tr -d ' ')" != 7f454c46 ] || return 0
        done < <(LC_ALL=C grep -aboP "$magic" "$1" | cut -d: -f1)
    done <<<'\x28\xb5\x2f\xfd zstd -dcq
\xfd7zXZ\x00 xz -dcq --single-stream
\x02\x21\x4c\x18 lz4 -dcq'
    die "no kernel found in $1"
}

# The Debian kernel that the guests boot, unpacked beside cargo's output and not installed: kit/linux-VERSION, and a
# link `kernel` that names the one in use. Delete the link to look for a newer one.
fetch_kernel() {
    apt_view
    local package version dir
    package=$(apt-cache "${view[@]}" show "linux-image-amd64/$suite" | sed -nE 's/^Depends: (linux-image-[^ ,]+).*/\1/p' | head -n 1)
    [ -n "$package" ] || die "$suite has no linux-image-amd64"
    version=${package#linux-image-}
    dir=$kit/linux-$version
    if [ ! -e "$dir/vmlinux" ]; then
        say "fetching $package for the guests"
        mkdir -p "$scratch/deb" "$dir.new"
        (cd "$scratch/deb" && as_root apt-get "${view[@]}" download "$package/$suite" >/dev/null)
        dpkg -x "$scratch"/deb/*.deb "$dir.new"
        [ -e "$dir.new/lib/modules" ] || ln -s usr/lib "$dir.new/lib"    # Debian 13 packages name /usr/lib
        "$(command -v depmod || echo /usr/sbin/depmod)" -b "$dir.new" "$version"
        extract_vmlinux "$dir.new/boot/vmlinuz-$version" "$dir.new/vmlinux"
        rm -rf "$dir.new/boot" "$dir.new/usr/share" "$dir"
        mv "$dir.new" "$dir"
    fi
    ln -sfn "linux-$version" "$kit/kernel"
}

mkdir -p "$kit"
[ -e "$kit/kernel/vmlinux" ] || fetch_kernel
say "ready: QEMU $(dpkg-query -W -f '${Version}' qemu-system-x86), guest kernel $(readlink "$kit/kernel")"
