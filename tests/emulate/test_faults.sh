#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Faults that the emulated tests must catch. Each is planted into a copy of a real file by one edit; a test is linked with that copy
# and must fail with the words expected. Unchanged copies must pass. An edit that finds nothing to change fails: then mend it here.
[ -n "$EMULATED_TESTS" ] || { echo "not built: configure found no CUDA headers (cuda_bf16.h)"; exit 77; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
wrong() { failed=$((failed + 1)); echo "FAIL $1"; }

# build DIR FILE TEST: the copies in DIR/cuda stand before the real files. FILE is a kernel's, without .cu, or host code
build() {
    case $2 in
    *.c) compile="$EMULATE_CC" source=$2 ;;
    *) compile="$EMULATE_CXX" source=$2.cu ;;
    esac
    object=tests/tests_emulate_test_$3-test_$3.o # of a test that other backends have, too
    [ -f "$object" ] || object=tests/emulate/test_$3-test_$3.o
    $compile -I"$1" $EMULATE_FLAGS -c -o "$1/kernel.o" "$1/cuda/$source" 2>"$1/err" &&
        $EMULATE_LINK -o "$1/test" "$object" "$1/kernel.o" $EMULATE_LIBS 2>>"$1/err" || { head -n 20 "$1/err"; return 1; }
}
run() { # the shell need not say that it was aborted
    case $2 in
    *_3ranks) (NP=2 timeout 240 sh "$top_srcdir/tests/mpirun.sh" "$1/test" >"$1/out" 2>&1; exit $?) 2>/dev/null ;;
    *) (timeout 240 "$1/test" >"$1/out" 2>&1; exit $?) 2>/dev/null ;;
    esac
}
# copy DIR FILE: the file, and what kernels share
copy() {
    case $2 in *.c) source=$2 ;; *) source=$2.cu ;; esac
    rm -rf "$1" && mkdir -p "$1/cuda" && cp "$top_srcdir/cuda/$source" "$top_srcdir/cuda/device.cuh" "$1/cuda" && chmod u+w "$1/cuda"/* || exit 1
}
# unchanged FILE TEST
unchanged() {
    d=$work/$1
    copy "$d" "$1"
    build "$d" "$1" "$2" || { wrong "$1, unchanged: does not build"; return; }
    if run "$d" "$2"; then
        passed=$((passed + 1)); echo "ok   $1, unchanged: $(tail -n 1 "$d/out")"
    else
        wrong "$1, unchanged: $(head -c 400 "$d/out")"
    fi
}
# fault WHAT CHANGED 'EDIT' FILE TEST 'PATTERN': sed's EDIT changes one line of cuda/CHANGED, which FILE is or includes; PATTERN is grep's (extended)
fault() {
    d=$work/fault
    copy "$d" "$4"
    sed -i "$3" "$d/cuda/$2"
    changed=$(diff "$top_srcdir/cuda/$2" "$d/cuda/$2" | grep -c '^<')
    [ "$changed" = 1 ] || { wrong "$1: the edit changes $changed lines of cuda/$2, not one: mend it"; return; }
    build "$d" "$4" "$5" || { wrong "$1: does not build"; return; }
    if run "$d" "$5"; then
        wrong "$1: not caught"
    elif grep -Eq -- "$6" "$d/out"; then
        passed=$((passed + 1)); echo "ok   $1: $(grep -E -m 1 -- "$6" "$d/out")"
    else
        wrong "$1: wanted '$6', found: $(head -c 400 "$d/out")"
    fi
}

# a lane that reads too early finds nothing there, or what another writes at the same time: the order of threads decides
early='read at .* (never written by this block|races with the write)'
fault 'a barrier removed behind a store to shared memory' device.cuh '/slots\[warp\] = v/{n;s/__syncthreads();//}' adamw adamw \
    "$early"
fault 'a barrier removed before shared memory is used again' device.cuh '/block_sum(F v, F/,/^}/{/slots may still be read/s/__syncthreads();//}' groupnorm groupnorm \
    'write at .* races with the read'
fault 'a store one past the end' elementwise.cu 's/i < (n); i += /i <= (n); i += /' elementwise simple 'outside every allocation'
fault 'half a warp summed' device.cuh '/float warp_sum(float v)/{n;s/i = 16/i = 8/}' rmsnorm rmsnorm 'expected .* times the tolerance'
fault 'a warp that does not wait for its lanes' heads.cu '/shared\[e\] = h\.v/{n;s/__syncwarp();//}' heads heads "$early"
fault 'scratch read that nobody wrote' colsum.cu 's/, rows, per, n))) : FD_OK/, rows < per ? rows : per, per, n))) : FD_OK/' colsum colsum 'never written'
fault 'a run that ends before its sums' collective.c '/fd_status fd_cuda_collective_join/,/^}/s/FD_TRY(FD_CUDA(cudaStreamWaitEvent.*//' \
    collective.c reduce_3ranks 'wrong == 0'
fault 'pinned memory used again too early' backend.c 's/FD_TRY(FD_CUDA(cudaEventSynchronize(c->stage_done\[c->stage_half\])));//' backend.c copies 'wrong == 0'
unchanged backend.c copies
fault 'a backward pass without its length mask' cudnn_attention.c 's/CUDNN_POINTWISE_EXP, masked(g, s, x, nq, nk), NULL)/CUDNN_POINTWISE_EXP, x, NULL)/' \
    cudnn_attention.c plans 'attention without a length mask'
unchanged cudnn_attention.c plans
fault 'padding on the wrong side' cudnn_conv.c 's/{{c->top, c->left}, {c->bottom, c->right}/{{c->bottom, c->right}, {c->top, c->left}/' cudnn_conv.c conv2d \
    'y\[.* times the tolerance'
unchanged cudnn_conv.c conv2d
fault 'a sum that nobody waits for' collective.c '/^fd_status cuda_reduce_wait/,/^}/s/if (c->comm) return .*/if (c->comm) return FD_OK;/' \
    collective.c reduce_3ranks 'wrong == 0'
fault 'a factor left out of a gradient' cudnn_attention.c '/ds = pointwise(g, s, CUDNN_POINTWISE_MUL, ds, scale);/d' cudnn_attention.c attention \
    'expected .* times the tolerance'
for pair in 'collective.c reduce_3ranks' 'adamw adamw' 'groupnorm groupnorm' 'elementwise simple' 'rmsnorm rmsnorm' 'heads heads' 'colsum colsum'; do
    unchanged $pair
done
echo "$passed passed, $failed failed, 0 skipped"
exit $((failed > 0))
