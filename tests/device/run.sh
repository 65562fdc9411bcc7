#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Packs what a machine with a GPU, but without network, compiler and libraries needs to check and measure fdhpc. To be run here, where there is a
# CUDA toolkit (no GPU is needed), a package archive (Debian 12) and a compiler.
#
#   run.sh [-b DIR] [-o DIR] [-s MB] [-t]
#
#   -b DIR   build folder (build); configured with --with-cuda if it is not yet
#   -o DIR   where the pack goes (gpu-pack): pack.tar.xz and go.sh, to be copied to the GPU machine
#   -s MB    largest size of the pack (60)
#   -t       the source tree itself travels too, with the pack's folder in it: input/ and tests/golden/ are not packed once more
#
# There:  bash go.sh check   or   bash go.sh bench      (go.sh says more; each takes at most 10 minutes)
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
build=build out=gpu-pack limit=60 tree_too=''
while getopts b:o:s:t opt; do
    case $opt in
    b) build=$OPTARG ;;
    o) out=$OPTARG ;;
    s) limit=$OPTARG ;;
    t) tree_too=1 ;;
    *) sed -n '3,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
mkdir -p "$build" "$out"
build=$(cd "$build" && pwd) out=$(cd "$out" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

if [ ! -f "$build/config.status" ]; then
    [ -x "$top/configure" ] || (cd "$top" && autoreconf -i)
    (cd "$build" && "$top/configure" -q --with-cuda)
fi
make -s -j"$(nproc)" -C "$build" device-programs
mapfile -t tests < <(bash "$here/check.sh" --build "$build" --source "$top" --list)
[ ${#tests[@]} -gt 0 ] || { echo "run.sh: $build is configured without CUDA"; exit 1; }

# As check.sh wants them: build/ and source/
mkdir -p "$tree/build/tests/device" "$tree/source/tests/device"
cp "$build/fdhpc" "$tree/build/"
cp "$build/tests/judge" "$tree/build/tests/"
tests+=(bench_kernels)
for t in "${tests[@]}"; do cp "$build/tests/device/$t" "$tree/build/tests/device/"; done
find "$tree/build" -type f -exec strip {} +
if [ -z "$tree_too" ]; then
    cp -r "$top/input" "$tree/source/"
    cp -r "$top/tests/golden" "$tree/source/tests/"
fi
cp "$here"/{check.sh,bench.sh,bench_torch.py,table.py} "$tree/source/tests/device/"
bash "$here/pack.sh" "$tree" "$build/fdhpc" "$build/tests/judge" "${tests[@]/#/$build/tests/device/}"
{
    echo "made      $(date -u '+%Y-%m-%d %H:%M UTC')"
    echo "commit    $(git -C "$top" describe --always --dirty 2>/dev/null || cat "$top/COMMIT" 2>/dev/null || echo unknown)"
    echo "configure $("$build/config.status" --config)"
    "$build/fdhpc" --version
} > "$tree/made.txt"

echo "run.sh: sizes in MB"
(cd "$tree" && du -sm build/fdhpc build/tests source root)
tar -C "$tree" --sort=name --owner=0 --group=0 --numeric-owner -cf - . | xz -T0 -6 --lzma2=dict=64MiB > "$out/pack.tar.xz"
cp "$here/there.sh" "$out/go.sh"
bytes=$(($(stat -c %s "$out/pack.tar.xz") + $(stat -c %s "$out/go.sh")))
awk -v b="$bytes" -v l="$limit" -v o="$out" 'BEGIN {
    printf "run.sh: %s: %.1f MB, at most %d MB allowed\n", o, b * 1e-6, l; exit b * 1e-6 > l }' || exit 1
