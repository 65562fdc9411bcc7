#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# go.sh of a pack (tests/device/run.sh makes it): the one command on the GPU machine. Needs bash, tar with xz or python3, CUDA's libraries (a toolkit
# or nvidia/* wheels); bench wants python3 with PyTorch too.
#
#   bash go.sh check [-o DIR] [-s SECONDS] [-- ARGUMENTS of check.sh]
#   bash go.sh bench [-o DIR] [-s SECONDS] [-- ARGUMENTS of bench.sh]
#
#   -o DIR       where the text goes (results): check.txt, bench.txt; keep them under doc/measurements/
#   -s SECONDS   all of it ends by then (570)
#
# DEVICE_ROOT: where it is unpacked, once (a folder in TMPDIR). The exit code is that of check.sh or bench.sh: 0 all is well, 1 something failed or
# a target was missed, 77 nothing could be run here.
set -u
export LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
usage() { sed -n '3,14s/^# \{0,1\}//p' "$0"; exit 2; }
what=${1-} out=results seconds=570
case $what in check|bench) shift ;; *) usage ;; esac
while getopts o:s: opt; do
    case $opt in
    o) out=$OPTARG ;;
    s) seconds=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

stamp=$(cksum < "$here/pack.tar.xz" | tr -d ' ')
root=${DEVICE_ROOT:-${TMPDIR:-/tmp}/fdhpc-gpu-$(id -u)}/$stamp
if [ ! -e "$root/unpacked" ]; then
    mkdir -p "$root"
    tar -xJf "$here/pack.tar.xz" -C "$root" 2>/dev/null ||
        python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$here/pack.tar.xz" "$root" ||
        { echo "go.sh: $here/pack.tar.xz cannot be unpacked to $root"; exit 1; }
    : > "$root/unpacked"
fi
{
    echo "command   bash go.sh $what $*"
    sed 's/^/pack      /' "$root/made.txt"
    echo "machine   $(uname -srm), $(grep -m 1 'model name' /proc/cpuinfo | cut -d: -f2-), $(nproc) cores"
    # shellcheck disable=SC1091
    . "$root/env.sh"
    # a pack without input/ and tests/golden/ (run.sh -t) lies in a folder of the source tree
    source=$root/source
    [ -e "$source/input" ] || source=$here/..
    bash "$root/source/tests/device/$what.sh" --build "$root/build" --source "$source" --work "$root/work" \
        --seconds $((seconds - SECONDS)) "$@"
    code=$?
    cp -f "$root"/work/*.json "$out"/ 2>/dev/null
    echo "exit code $code"
} 2>&1 | tee "$out/$what.txt"
exit "$(awk '/^exit code / { code = $3 } END { print code + 0 }' "$out/$what.txt")"
