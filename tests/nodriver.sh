#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# nodriver.sh FOLDER STUB: makes FOLDER/libcuda.so.1 with every function of the toolkit's stub driver. All fail (34, stub library) but loading a
# library or module, finding a kernel in it and asking for its attributes, which do nothing. With it cuDNN makes plans for a described device
# where there is none. Nothing can be run.
set -e
mkdir -p "$1"
{
    echo '#include <stddef.h>'
    echo 'static int nothing;'
    nm -D --defined-only "$2" | awk '$2 ~ /^[TW]$/ { print $3 }' | sort -u | while read -r f; do
        case $f in
        cuLibraryLoadData | cuLibraryGetKernel | cuModuleLoadData | cuModuleLoadDataEx | cuModuleGetFunction | cuLibraryGetModule | \
            cuKernelGetFunction | cuLibraryGetGlobal | cuModuleGetGlobal*)
            echo "int $f(void **p) { if (p) *p = &nothing; return 0; }" ;;
        cuOccupancyMaxActiveClusters | cuOccupancyMaxActiveBlocksPerMultiprocessor* | cuOccupancyMaxPotentialClusterSize)
            echo "int $f(int *n) { if (n) *n = 1; return 0; }" ;;
        cuLibraryUnload | cuModuleUnload | cuKernelSetAttribute | cuFuncSetAttribute | cuKernelGetAttribute | cuFuncGetAttribute | \
            cuFuncSetCacheConfig | cuKernelSetCacheConfig)
            echo "int $f(void) { return 0; }" ;;
        *) echo "int $f(void) { return 34; }" ;;
        esac
    done
} >"$1/nodriver.c"
${CC:-cc} -shared -fPIC -w -O1 -Wl,-soname,libcuda.so.1 -o "$1/libcuda.so.1" "$1/nodriver.c"
