// SPDX-License-Identifier: Apache-2.0
// Before a function with a simple loop: compiled once per CPU level, chosen when the program starts (gcc on x86).
#ifndef FD_BASE_CLONES_H
#define FD_BASE_CLONES_H

#if defined __x86_64__ && defined __GNUC__ && !defined __clang__
#define FD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FD_CLONES
#endif

#endif
