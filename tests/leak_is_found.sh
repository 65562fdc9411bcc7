#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# leak_is_found.sh - the leak checker is alive although it is told to ignore MPI's and HDF5's leaks.
out=$(NP=1 sh "${top_srcdir:-.}/tests/mpirun.sh" "${top_builddir:-.}/tests/leak" 2>&1) && { echo "the leak was not found"; exit 1; }
echo "$out"
echo "$out" | grep -q "came to its end" || exit 1
echo "$out" | grep -q "123 byte(s) leaked in 1 allocation" && echo "$out" | grep -q "in planted_leak"
