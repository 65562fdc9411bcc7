#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every kernel (__global__ function) of cuda/*.cu is launched by an emulated test. Each of $EMULATED_TESTS leaves the names that it launched in
# <test>.launched (tests/mpirun.sh, tests/emulate/emulate.cpp); make runs them before this script.
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# kernels FILE...: the names behind __global__, one a line
kernels() {
    sed 's://.*::' "$@" | tr '\n' ' ' | sed 's:/\*[^*]*\*/::g; s/__global__/\n&/g' |
        sed -n 's/^__global__//; t found; d; :found; s/__launch_bounds__ *([^()]*)//; s/(.*//; s/ *$//; s/.*[ *&]//; /./p' | sort -u
}
# launched FILE...: what FD_LAUNCH noted, "(ns::name<T, V>)" or "wide ? name<8> : name<1>", as plain names
launched() { cat "$@" | sed 's/::/@/g' | tr '?:' '\n\n' | sed 's/^[( ]*//; s/<.*//; s/.*@//; s/[^A-Za-z0-9_].*//' | sort -u; }

# first of itself: of five kernels written in five ways the one that is not launched is named
cat >"$work/x.cu" <<'END'
template <class T> __global__ void one(const T *x, int n) { }
__global__ void __launch_bounds__(BLOCK)
    two(float *x) { }
/* __global__ void none(int) */
template <class T, int V>
__global__ void __launch_bounds__(256, 2) three(T *x) { } // __global__ void neither(int)
static __global__ void
four(int n) { }
template <int V> __global__ void five(int n) { }
END
printf '%s\n' '(one<float, V>)' 'ns::two<fd::bf16>' '(four)' '(wide) ? ns::five<8> : ns::five<1>' >"$work/x.launched"
kernels "$work/x.cu" >"$work/all"
launched "$work/x.launched" >"$work/some"
[ "$(comm -23 "$work/all" "$work/some")" = three ] || { echo "this script is wrong: it finds $(comm -23 "$work/all" "$work/some" | tr '\n' ' ')"; exit 1; }

[ -n "$EMULATED_TESTS" ] || { echo "the kernels are not tested: configure found no CUDA headers (cuda_bf16.h)"; exit 77; }
for t in $EMULATED_TESTS; do
    [ -f "$t.launched" ] && cat "$t.launched"
done >"$work/x.launched"
kernels "$top_srcdir"/cuda/*.cu >"$work/all"
launched "$work/x.launched" >"$work/some"
missing=$(comm -23 "$work/all" "$work/some")
echo "$(wc -l <"$work/all") kernels in cuda/"
[ -s "$work/all" ] || { echo "no kernel was found in $top_srcdir/cuda"; exit 1; }
[ -z "$missing" ] && exit 0
echo "launched by no emulated test (FD_LAUNCH notes the name that it is given):"
for k in $missing; do
    grep -n "\<$k\>" "$top_srcdir"/cuda/*.cu | head -n 1
done
exit 1
