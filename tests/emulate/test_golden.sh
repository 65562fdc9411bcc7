#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The records of the original on the CUDA backend, emulated: whole models through its kernels and its code, in fp32 and in bf16.
[ -x "$top_builddir/tests/emulate/fdhpc" ] || { echo "not built: configure found no CUDA headers (cuda_bf16.h)"; exit 77; }
failed=0
for dtype in f32 bf16; do
    "$top_builddir/tests/emulate/fdhpc" verify "$GOLDEN" --backend cuda --dtype $dtype >test_emulated_golden.tmp 2>&1 || failed=1
    cat test_emulated_golden.tmp
    line=$(sed -n 's/^[0-9]* cases: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) not built$/\1 passed, \2 failed, \3 skipped/p' test_emulated_golden.tmp)
    if [ -n "$line" ]; then echo "$line"; else failed=1; fi
done
rm -f test_emulated_golden.tmp
exit $failed
