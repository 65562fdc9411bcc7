#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every cuda/*.cu compiles where nvcc is. Built with CUDA: make has compiled them, and each object holds code for each architecture asked for.
# Built without (a library is missing, --without-cuda): each is compiled here, for one architecture and without optimisation.
if [ -n "$BUILT_WITH_CUDA" ]; then
    failed=0 n=0
    for f in "$top_srcdir"/cuda/*.cu; do
        o=$top_builddir/cuda/$(basename "$f" .cu).o
        n=$((n + 1))
        [ -f "$o" ] || { echo "FAIL $f is not compiled: list it in cuda/local.am"; failed=1; continue; }
        for a in $CUDA_ARCH; do # a cubin keeps the command line of ptxas
            grep -aq -- "-arch sm_$a " "$o" || { echo "FAIL $o holds no code for sm_$a"; failed=1; }
        done
    done
    echo "$n files compiled for $CUDA_ARCH"
    exit $failed
fi

nvcc=
for f in "$NVCC" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "${CUDA_PATH:+$CUDA_PATH/bin/nvcc}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc /opt/cuda/bin/nvcc; do
    [ -z "$nvcc" ] && [ -n "$f" ] && [ -x "$f" ] && nvcc=$f
done
[ -n "$nvcc" ] || { echo "no nvcc (in PATH, CUDA_HOME, /usr/local/cuda): cuda/*.cu are compiled for the emulator only"; exit 77; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
arch=${CUDA_ARCH##* }
export nvcc work arch top_srcdir top_builddir
# two at a time, as -j2
printf '%s\n' "$top_srcdir"/cuda/*.cu | xargs -P 2 -I@ sh -c '
    name=$(basename "$1" .cu)
    $nvcc -Werror all-warnings -gencode=arch=compute_$arch,code=sm_$arch -Xcicc -O0 -Xptxas -O0 -std=c++17 -D_GNU_SOURCE -I"$top_builddir" -I"$top_srcdir/src" \
        -I"$top_srcdir" -c -o "$work/$name.o" "$1" >"$work/$name.err" 2>&1 || { echo "FAIL $1"; head -n 20 "$work/$name.err"; }' sh @
n=0 compiled=0
for f in "$top_srcdir"/cuda/*.cu; do
    n=$((n + 1))
    [ -f "$work/$(basename "$f" .cu).o" ] && compiled=$((compiled + 1))
done
echo "$compiled of $n files compile for sm_$arch with $nvcc"
[ "$n" -gt 0 ] && [ "$compiled" = "$n" ]
