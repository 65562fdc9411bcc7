#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# make check-cudnn-plans: cuDNN's plans of all production shapes, made on a machine without a GPU (tests/cudnn_plans.c). A few minutes; 77 where there
# is no toolkit.
build=${top_builddir:-.} source=${top_srcdir:-..}
program=$PWD/$build/tests/cudnn_plans
skip() {
    echo "cudnn_plans: skipped: $1"
    exit 77
}
[ -x "$program" ] || skip "configured without CUDA (--with-cuda=DIR)"
toolkit=$(dirname "$(dirname "$(command -v "$NVCC")")")
for stub in "$toolkit"/lib64/stubs/libcuda.so "$toolkit"/lib/stubs/libcuda.so "$toolkit"/targets/*/lib/stubs/libcuda.so; do
    [ -f "$stub" ] && break
done
[ -f "$stub" ] || skip "$toolkit has no stub of the driver (lib64/stubs/libcuda.so)"
command -v nm >/dev/null || skip "no nm"
source=$(cd "$source" && pwd)
work=${TMPDIR:-/tmp}/fdhpc-cudnn-plans.$$
mkdir -p "$work/cache" || exit 1
trap 'rm -rf "$work"' EXIT
sh "$source/tests/nodriver.sh" "$work/driver" "$stub" || exit 1
cd "$source" || exit 1 # configurations name models below input/
LD_LIBRARY_PATH=$work/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$program" tests/h200.json "$work/cache"
