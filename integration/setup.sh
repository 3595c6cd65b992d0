#!/bin/bash
# Sets a Debian machine (12 or later) up for this project; installs only what is missing and asks nothing.
#
#   setup.sh python   print the path of a Python >= 3.11 that can make virtual environments, installing one if needed
#   setup.sh qemu     what the integration tests and the demo need: QEMU, a C compiler, e2fsprogs
#   setup.sh guest    fetch (not install) the packages that the test guest is made of, into .cache/guest
#   setup.sh make     make itself
#   setup.sh qemu-root SUITE
#                     another Debian release's QEMU (bookworm, trixie, sid) into .cache/qemu/SUITE, to be run from there
#
# All that this project does with apt is in this file. Progress goes to stderr.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
export DEBIAN_FRONTEND=noninteractive
cache=.cache/guest

say() { printf 'setup: %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n env DEBIAN_FRONTEND=noninteractive "$@"
    else
        say "root is needed for: $*"
        say "do that as root, or start this again as root or as a user with sudo that asks for no password"
        return 1
    fi
}

need_apt() {
    command -v apt-get >/dev/null && return
    say "this is not a Debian system; install yourself: $*"
    exit 1
}

# what apt has to say is of interest only when it fails
apt() {
    local output
    output=$(as_root apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 -qq "$@" 2>&1) && return
    printf '%s\n' "$output" >&2
    return 1
}

update() {
    say "reading the package lists"
    apt update
}

# The lists may be missing (a fresh container) or too old (what they name is gone).
known() {
    local package
    for package in "$@"; do
        [ -n "$(apt-cache show --no-all-versions "$package" 2>/dev/null)" ] || return 1
    done
}

install() {
    need_apt "$@"
    say "installing $*"
    known "$@" || update
    apt install -y --no-install-recommends "$@" || { update; apt install -y --no-install-recommends "$@"; }
}

# missing PACKAGE PROGRAM ...: add the package to $packages unless all programs are there
packages=
missing() {
    local package=$1 program
    shift
    for program in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || { packages="$packages $package"; return; }
    done
}

good_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python() {
    local candidate
    for candidate in "$(command -v python3 || true)" /usr/bin/python3; do
        if [ -n "$candidate" ] && good_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    install python3 python3-venv
    if good_python /usr/bin/python3; then
        echo /usr/bin/python3
    else
        say "/usr/bin/python3 is $(/usr/bin/python3 --version 2>&1): at least 3.11 is needed (Debian 12)"
        return 1
    fi
}

qemu() {
    missing qemu-system-x86 qemu-system-x86_64
    missing qemu-utils qemu-img qemu-nbd
    missing e2fsprogs mke2fs e2fsck
    missing gcc gcc
    missing util-linux setpriv
    # the guest's programs are linked statically
    local libc=
    command -v gcc >/dev/null && libc=$(gcc -print-file-name=libc.a)
    [ -n "$libc" ] && [ -e "$libc" ] || packages="$packages libc6-dev"
    # shellcheck disable=SC2086
    [ -z "$packages" ] || install $packages
}

download() {
    (cd "$cache/incoming" && apt-get -o Acquire::Retries=3 -o APT::Sandbox::User=root -qq download "$1" >&2)
}

fetch() {
    need_apt "(fetch only) $1"
    known "$1" || update
    say "fetching $1"
    download "$1" || { update; download "$1"; }
    mv "$cache/incoming/"*.deb "$cache/"
}

guest() {
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock 9
    rm -rf "$cache/incoming"
    mkdir "$cache/incoming"
    if ! compgen -G "$cache/linux-image-*-cloud-*.deb" >/dev/null; then
        need_apt "(fetch only) linux-image-cloud-amd64"
        known linux-image-cloud-amd64 || update
        # the metapackage names the kernel of the day
        fetch "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)"
    fi
    compgen -G "$cache/busybox-static_*.deb" >/dev/null || fetch busybox-static
    rmdir "$cache/incoming"
}

# The mirror and the proxy that the machine's own apt uses; the security archive and other people's are not it.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' "Created-By: Packages" "Origin: Debian" "Label: Debian" \
        "Component: main" 2>/dev/null | head -n 1
}

proxy() {
    local address
    address=$(apt-config shell address Acquire::http::Proxy 2>/dev/null | sed "s/^address='\(.*\)'$/\1/")
    [ -z "$address" ] || [ "$address" = DIRECT ] || echo "http_proxy=$address"
}

# What debootstrap mounts in there, and leaves where it is killed, must not be emptied with it.
unmount() {
    local point
    awk -v under="$PWD/$1/" 'index($2, under) == 1 { print $2 }' /proc/self/mounts | sort -r |
        while read -r point; do as_root umount "$point" >&2; done
}

remove() {
    [ -e "$1" ] || return 0
    unmount "$1"
    as_root rm -rf --one-file-system "$1"
}

# A root that is not complete never has its final name, so an interrupted one is not taken for one, and is begun anew.
qemu_root() {
    local suite=$1 root=.cache/qemu/$1 new=.cache/qemu/$1.new from log
    mkdir -p .cache/qemu
    exec 9>".cache/qemu/$suite.lock"
    flock 9
    [ ! -e "$root" ] || return 0
    need_apt "QEMU of Debian $suite"
    PATH=$PATH:/usr/sbin command -v debootstrap >/dev/null || install debootstrap
    [ -n "$(mirror)" ] || update
    from=$(mirror)
    if [ -z "$from" ]; then
        say "apt's sources name no Debian mirror"
        return 1
    fi
    say "fetching QEMU of Debian $suite (a minute, 500 MB while it is unpacked)"
    log=.cache/qemu/$suite.log
    remove "$new"
    mkdir "$new"
    # debootstrap is told the whole path: it makes links of it
    # shellcheck disable=SC2046
    if ! as_root env PATH="$PATH:/usr/sbin:/sbin" $(proxy) debootstrap --variant=minbase \
        --include=qemu-system-x86,qemu-utils,qemu-block-extra "$suite" "$PWD/$new" "$from" >"$log" 2>&1 9>&-; then
        # the mirror's address and whatever comes with it stay in the log
        say "debootstrap failed: $(grep -E '^[EW]:' "$log" | tail -n 1 | sed -E 's,[a-z]+://[^ ]*,the mirror,'); all of it is in $log"
        remove "$new"
        return 1
    fi
    unmount "$new"
    # ours, so that it can be removed without root; and without what no QEMU needs
    as_root chown -R "$(id -u):$(id -g)" "$new"
    rm -rf "$new"/var/cache/apt/archives/*.deb "$new"/var/lib/apt/lists/* "$new"/usr/share/{doc,man,locale} "$new"/dev/*
    mv "$new" "$root"
}

case ${1-} in
python | qemu | guest) "$1" ;;
qemu-root)
    case ${2-} in
    "" | *[!a-z]*) say "which suite? such as: setup.sh qemu-root trixie" && exit 2 ;;
    *) qemu_root "$2" ;;
    esac
    ;;
make) command -v make >/dev/null || install make ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
