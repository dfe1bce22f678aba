#!/bin/sh
# setup.sh [demo|test|bench]: installs what `make demo`, `make test` and `make bench-peers` need, and unpacks a
# guest kernel for the VM tests.
#
# It says what it does, does only what is missing, and is quick when nothing is. What it changes:
#   - Debian packages (needs root): QEMU and a few tools. Nothing is removed, no service is started.
#   - .cache/kernel/ in this checkout: a Debian cloud kernel, downloaded as a package and unpacked, never installed.
# Settings: VHOSTD_CACHE names another directory than .cache.
set -eu

cd "$(dirname "$0")/.."
what=${1:-test}
cache=${VHOSTD_CACHE:-$PWD/.cache}
case $what in demo|test|bench) ;; *) echo "usage: $0 [demo|test|bench]" >&2; exit 2 ;; esac

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }
have() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1; }
apt() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -q "$@"; }

have go || die "Go is not in \$PATH: install the version that go.mod asks for, from https://go.dev/dl/"
have apt-get || die "this host has no apt-get. Install QEMU (qemu-system-x86_64) and ethtool by its own means, then set
VMTEST_KERNEL to a kernel image and VMTEST_MODULES to its lib/modules/VERSION/kernel directory, and run make again"

# program:package
wanted="qemu-system-x86_64:qemu-system-x86 setpriv:util-linux"
# The race detector is linked by a C compiler; nothing of vhostd is C.
[ "$what" = demo ] || wanted="$wanted ethtool:ethtool gcc:gcc"
packages=
for pair in $wanted; do have "${pair%%:*}" || packages="$packages ${pair#*:}"; done
[ "$what" = demo ] || [ -e /usr/include/stdlib.h ] || packages="$packages libc6-dev"
updated=
update() { # the lists of a fresh machine are empty or old
	[ -z "$updated" ] || return 0
	[ "$(id -u)" = 0 ] || return 0
	say "apt-get update"
	apt update >/dev/null
	updated=yes
}

# DPDK's testpmd, a guest and a back-end of somebody else's (32 MB). Its drivers are plug-ins, with the version in the package's name.
if [ "$what" != demo ] && ! have dpdk-testpmd; then
	update
	packages="$packages dpdk-dev $(apt-cache search --names-only '^librte-net-(virtio|vhost|pcap)[0-9]+$' | cut -d' ' -f1 | tr '\n' ' ')"
fi

if [ -n "$packages" ]; then
	[ "$(id -u)" = 0 ] || die "not root. Install by hand, then run make again:
	sudo apt-get install --no-install-recommends$packages"
	update
	say "apt-get install$packages"
	# shellcheck disable=SC2086 # a list of words
	apt install -y --no-install-recommends $packages >/dev/null
fi

kernel_ready() { [ -f "$cache/kernel/vmlinuz" ] && [ -d "$cache/kernel/modules" ]; }

fetch_kernel() { # into $cache/kernel, all or nothing
	update
	meta=linux-image-cloud-amd64
	package=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
	[ -n "$package" ] || die "apt knows no $meta: run 'apt-get update' as root first"
	tmp=$(mktemp -d "$cache/kernel.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	say "downloading $package (about 27 MB; unpacked into $cache/kernel, not installed)"
	# apt fetches as its own user, who must be able to write here.
	chmod 755 "$tmp"
	(cd "$tmp" && apt -o APT::Sandbox::User=root download "$package" >/dev/null) ||
		die "apt-get download $package failed: run 'apt-get update' as root, then make again"
	dpkg -x "$tmp"/*.deb "$tmp/root"
	mkdir "$tmp/kernel"
	mv "$tmp"/root/boot/vmlinuz-* "$tmp/kernel/vmlinuz"
	mv "$tmp"/root/lib/modules/*/kernel "$tmp/kernel/modules"
	echo "$package" >"$tmp/kernel/package"
	chmod -R a+rX "$tmp/kernel"
	rm -rf "$cache/kernel"
	mv "$tmp/kernel" "$cache/kernel"
	rm -rf "$tmp"
	trap - EXIT
}

if [ -n "${VMTEST_KERNEL:-}" ]; then
	say "guest kernel: VMTEST_KERNEL=$VMTEST_KERNEL"
else
	mkdir -p "$cache"
	kernel_ready || fetch_kernel
	say "guest kernel: $(cat "$cache/kernel/package")"
fi
say "ready for make $what"
