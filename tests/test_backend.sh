#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# trainer.backend where no GPU can be used: "auto" trains on the CPU and says why, "cuda" stops with what to do. A machine's own GPUs are hidden;
# other machines are played by a libcuda.so.1 that is of an old driver, or finds no GPU.
case $top_builddir in /*) ;; *) top_builddir=$PWD/$top_builddir ;; esac
fdhpc=$top_builddir/fdhpc
. "$(dirname "$0")/demo_run.sh"
work=$(mktemp -d) && cd "$work" || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
export OMP_NUM_THREADS CUDA_VISIBLE_DEVICES
demo_run x.cfg || exit 1

# run NAME BACKEND EXIT 'PATTERN': what is printed matches
run() {
    rm -rf run
    timeout 60 "$fdhpc" x.cfg --set trainer.backend="$2" >out 2>&1 </dev/null
    got=$?
    if [ "$got" != "$3" ]; then
        failed=$((failed + 1)); echo "FAIL $1: exit $got, wanted $3: $(head -c 800 out)"
    elif ! grep -Eq -- "$4" out; then
        failed=$((failed + 1)); echo "FAIL $1: wanted a line with '$4', found: $(head -c 800 out)"
    else
        passed=$((passed + 1)); echo "ok   $1: $(grep -E -m 1 -- "$4" out)"
    fi
}

run 'cpu' cpu 0 'backend: cpu'
run 'no such backend' vulkan 2 'trainer.backend = "vulkan"'
if "$fdhpc" --version | grep -q 'cuda (not built'; then
    run 'auto, not built' auto 0 'backend: cpu'
    run 'cuda, not built' cuda 8 'backend cuda is not built: reconfigure with --with-cuda=DIR'
    echo "$passed passed, $failed failed, 0 skipped"
    exit $((failed > 0))
fi

# nothing that is loaded at start may need the driver
if ldd "$fdhpc" | grep 'libcuda\.so'; then
    failed=$((failed + 1)); echo "FAIL fdhpc does not start without a driver"
fi
# driver VERSION: a libcuda.so.1 of this version that finds no GPU
cat >driver.c <<'END'
#include <string.h>
static int version(int *v) { return *v = VERSION, 0; }
static int no_device(void) { return 100; }
int cuGetProcAddress(const char *name, void **f, int v, unsigned long long flags) {
  (void)v, (void)flags;
  *f = !strcmp(name, "cuDriverGetVersion") ? (void *)version : !strncmp(name, "cuGetProcAddress", 16) ? (void *)cuGetProcAddress : (void *)no_device;
  return 0;
}
int cuGetProcAddress_v2(const char *name, void **f, int v, unsigned long long flags, void *status) {
  (void)status;
  return cuGetProcAddress(name, f, v, flags);
}
int cuDriverGetVersion(int *v) { return version(v); }
int cuInit(unsigned flags) { return (int)flags * 0 + 100; }
END
driver() {
    mkdir -p "$1" && $CC -shared -fPIC -DVERSION="$1" -o "$1/libcuda.so.1" driver.c || exit 1
    LD_LIBRARY_PATH=$work/$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
}
if [ ! -e /proc/driver/nvidia/version ]; then
    run 'auto, no driver' auto 0 'backend cuda is not used: no NVIDIA driver on this machine'
    run 'auto, no driver: the CPU trains' auto 0 'backend: cpu'
    run 'cuda, no driver' cuda 8 'error: cuda: no NVIDIA driver on this machine; trainer.backend = "cpu" runs without a GPU'
fi
driver 99000
run 'auto, no GPU' auto 0 'backend cuda is not used: the NVIDIA driver finds no GPU \(CUDA_VISIBLE_DEVICES=""\)'
run 'cuda, no GPU' cuda 8 'error: cuda: the NVIDIA driver finds no GPU'
driver 9020
run 'auto, old driver' auto 0 'backend cuda is not used: the NVIDIA driver is too old: it is for CUDA 9.2, this program is built with CUDA [0-9]+\.[0-9]+;'
run 'cuda, old driver' cuda 8 'error: cuda: the NVIDIA driver is too old.*update the driver, or build with CUDA 9;'
echo "$passed passed, $failed failed, 0 skipped"
exit $((failed > 0))
