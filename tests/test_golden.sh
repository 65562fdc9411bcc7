#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The records of the original: in fp32, in bf16, and in both on a CPU that has only AVX2. make check GOLDEN=DIR runs others.
verify() {
    "$top_builddir/fdhpc" verify "$@" "$GOLDEN" >test_golden.tmp 2>&1
    status=$?
    cat test_golden.tmp
    [ $status = 0 ] || failed=1
    line=$(sed -n 's/^[0-9]* cases: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) not built$/\1 passed, \2 failed, \3 skipped/p' test_golden.tmp)
    if [ -n "$line" ]; then echo "$line"; else failed=1; fi
    rm -f test_golden.tmp
}
failed=0
verify
verify --dtype bf16
DNNL_MAX_CPU_ISA=AVX2
export DNNL_MAX_CPU_ISA
verify
verify --dtype bf16
exit $failed
