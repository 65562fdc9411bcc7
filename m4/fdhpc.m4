# SPDX-License-Identifier: Apache-2.0
# One macro per dependency. Each adds a row to the summary, or stops with the Debian package's name.

# FDHPC_ROW(NAME, VERSION, WHAT FOR)
m4_define([FDHPC_ROW], [fdhpc_rows="$fdhpc_rows
`printf '  %-16s %-28s %s' "$1" "$2" "$3"`"])

# FDHPC_WARNINGS: -Wall -Wextra always; --enable-werror makes them errors.
AC_DEFUN([FDHPC_WARNINGS], [
AC_ARG_ENABLE([werror], [AS_HELP_STRING([--enable-werror], [treat compiler warnings as errors])], [], [enable_werror=no])
FD_WARN="-Wall -Wextra"
# messages are cut at their buffer on purpose (gcc only; clang does not know the warning)
AS_IF([$CC -Werror -Wno-format-truncation -x c -c -o conftest.o - </dev/null 2>/dev/null], [FD_WARN="$FD_WARN -Wno-format-truncation"])
rm -f conftest.o
AS_IF([test "$enable_werror" = yes], [FD_WARN="$FD_WARN -Werror"])
AC_SUBST([FD_WARN])
])

# FDHPC_SANITIZERS: --enable-sanitizers builds everything with address and undefined-behaviour checks (make check-sanitize).
AC_DEFUN([FDHPC_SANITIZERS], [
AC_ARG_ENABLE([sanitizers], [AS_HELP_STRING([--enable-sanitizers], [find memory faults, leaks and undefined behaviour in make check])],
    [], [enable_sanitizers=no])
FD_SANITIZE=
AS_IF([test "$enable_sanitizers" = yes],
    [FD_SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"])
AC_SUBST([FD_SANITIZE])
AM_CONDITIONAL([SANITIZERS], [test "$enable_sanitizers" = yes])
])

# FDHPC_MPI: CC must compile and link MPI programs by itself (mpicc). Sets MPIRUN.
AC_DEFUN([FDHPC_MPI], [
AC_CACHE_CHECK([whether $CC links MPI programs], [fdhpc_cv_mpi],
    [AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <mpi.h>
#if MPI_VERSION < 3
#error MPI 3 is needed
#endif
]], [[return MPI_Init(0, 0);]])], [fdhpc_cv_mpi=yes], [fdhpc_cv_mpi=no])])
AS_IF([test "$fdhpc_cv_mpi" = no],
    [AC_MSG_ERROR([$CC does not build MPI 3 programs: install libopenmpi-dev, or set CC to an MPI compiler])])
AC_CACHE_CHECK([which MPI], [fdhpc_cv_mpi_version],
    [fdhpc_cv_mpi_version=`$CC --showme:version 2>/dev/null | $SED -n 's/.*Open MPI \([[^ ]]*\).*/Open MPI \1/p'`
     test -n "$fdhpc_cv_mpi_version" || fdhpc_cv_mpi_version=unknown])
AC_ARG_VAR([MPIRUN], [program that starts MPI programs])
AC_PATH_PROGS([MPIRUN], [mpirun mpiexec])
AS_IF([test -z "$MPIRUN"], [AC_MSG_ERROR([no mpirun: install openmpi-bin, or set MPIRUN])])
FDHPC_ROW([MPI], [$fdhpc_cv_mpi_version], [ranks])
])

AC_DEFUN([FDHPC_OPENMP], [
AC_OPENMP
AS_IF([test -z "$OPENMP_CFLAGS" && test "$ac_cv_prog_c_openmp" != "none needed"],
    [AC_MSG_ERROR([$CC has no OpenMP: use gcc, or install libomp-dev for clang])])
FDHPC_ROW([OpenMP], [$OPENMP_CFLAGS], [threads])
])

AC_DEFUN([FDHPC_HDF5], [
fdhpc_hdf5_module=
AC_ARG_VAR([HDF5_CFLAGS], [C compiler flags for parallel HDF5, overriding pkg-config])
AC_ARG_VAR([HDF5_LIBS], [linker flags for parallel HDF5, overriding pkg-config])
AS_IF([test -n "$HDF5_LIBS"], [fdhpc_hdf5_module=HDF5_LIBS],
    [for m in hdf5-openmpi hdf5-mpich hdf5-mpi hdf5; do
        AS_IF([$PKG_CONFIG --exists $m],
            [fdhpc_hdf5_module=$m
             HDF5_CFLAGS=`$PKG_CONFIG --cflags $m`
             HDF5_LIBS=`$PKG_CONFIG --libs $m`
             break])
     done])
AS_IF([test -z "$fdhpc_hdf5_module"],
    [AC_MSG_ERROR([no HDF5: install libhdf5-openmpi-dev, or set HDF5_CFLAGS and HDF5_LIBS])])
fdhpc_save_CPPFLAGS=$CPPFLAGS fdhpc_save_LIBS=$LIBS
CPPFLAGS="$CPPFLAGS $HDF5_CFLAGS" LIBS="$HDF5_LIBS $LIBS"
AC_CACHE_CHECK([whether HDF5 is parallel], [fdhpc_cv_hdf5_parallel],
    [AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <hdf5.h>
#ifndef H5_HAVE_PARALLEL
#error serial
#endif
]], [[return H5Pset_fapl_mpio(0, MPI_COMM_NULL, MPI_INFO_NULL);]])],
        [fdhpc_cv_hdf5_parallel=yes], [fdhpc_cv_hdf5_parallel=no])])
AS_IF([test "$fdhpc_cv_hdf5_parallel" = no],
    [AC_MSG_ERROR([HDF5 ($fdhpc_hdf5_module) is not built for MPI, or not for this MPI: install libhdf5-openmpi-dev])])
AC_CACHE_VAL([fdhpc_cv_hdf5_version],
    [fdhpc_cv_hdf5_version=`echo '#include <hdf5.h>
fdhpc H5_VERS_MAJOR H5_VERS_MINOR H5_VERS_RELEASE' | $CC -E $CPPFLAGS - 2>/dev/null |
        $SED -n 's/^fdhpc \([[0-9]]*\) \([[0-9]]*\) \([[0-9]]*\)$/\1.\2.\3/p'`])
CPPFLAGS=$fdhpc_save_CPPFLAGS LIBS=$fdhpc_save_LIBS
FDHPC_ROW([parallel HDF5], [$fdhpc_cv_hdf5_version ($fdhpc_hdf5_module)], [checkpoints and data sets])
])

# Debian's oneDNN has no pkg-config file.
AC_DEFUN([FDHPC_DNNL], [
AC_SUBST([DNNL_LIBS])
fdhpc_save_LIBS=$LIBS
AC_CHECK_HEADER([oneapi/dnnl/dnnl.h],
    [AC_CHECK_LIB([dnnl], [dnnl_version], [DNNL_LIBS=-ldnnl])])
LIBS=$fdhpc_save_LIBS
AS_IF([test -z "$DNNL_LIBS"], [AC_MSG_ERROR([no oneDNN: install libdnnl-dev])])
fdhpc_dnnl_version=`printf '#include <oneapi/dnnl/dnnl_version.h>\nfdhpc DNNL_VERSION_MAJOR.DNNL_VERSION_MINOR.DNNL_VERSION_PATCH\n' |
    $CC -E -P $CPPFLAGS - 2>/dev/null | $SED -n 's/^fdhpc //p' | tr -d ' '`
FDHPC_ROW([oneDNN], [$fdhpc_dnnl_version], [matrix products and convolutions])
])

# FDHPC_LIBRARY(VARIABLE, PKG-CONFIG MODULES, VERSION, DEBIAN PACKAGE, WHAT FOR)
AC_DEFUN([FDHPC_LIBRARY], [
PKG_CHECK_MODULES([$1], m4_quote(m4_map_args_sep([], [ >= $3], [ ], m4_unquote(m4_split([$2])))), [],
    [AC_MSG_ERROR([no $2 (at least $3), for $5: install $4])])
fdhpc_version=`$PKG_CONFIG --modversion m4_car(m4_unquote(m4_split([$2])))`
FDHPC_ROW(m4_car(m4_unquote(m4_split([$2]))), [$fdhpc_version], [$5])
])

# FDHPC_HEADER(HEADER, DEBIAN PACKAGE, WHAT FOR)
AC_DEFUN([FDHPC_HEADER], [
AC_CHECK_HEADER([$1], [], [AC_MSG_ERROR([no <$1>, for $3: install $2])])
FDHPC_ROW([$1], [found], [$3])
])

# cmocka is only for make check.
AC_DEFUN([FDHPC_CMOCKA], [
PKG_CHECK_MODULES([CMOCKA], [cmocka >= 1.1], [fdhpc_cmocka=yes], [fdhpc_cmocka=no])
AM_CONDITIONAL([HAVE_CMOCKA], [test $fdhpc_cmocka = yes])
AS_IF([test $fdhpc_cmocka = yes], [fdhpc_version=`$PKG_CONFIG --modversion cmocka`],
    [fdhpc_version="none: install libcmocka-dev"])
FDHPC_ROW([cmocka], [$fdhpc_version], [make check])
])

# FDHPC_COMMIT: which commit this is, for --version: from git, or from the file COMMIT that make dist leaves.
AC_DEFUN([FDHPC_COMMIT], [
fdhpc_commit=unknown
AS_IF([test -f "$srcdir/COMMIT"], [fdhpc_commit=`cat "$srcdir/COMMIT"`],
    [test -e "$srcdir/.git"], [fdhpc_commit=`git -C "$srcdir" rev-parse --short=12 HEAD 2>/dev/null || echo unknown`])
AC_DEFINE_UNQUOTED([FD_COMMIT], ["$fdhpc_commit"], [commit this was configured from])
AC_DEFINE_UNQUOTED([FD_SENTENCEPIECE_VERSION], ["`$PKG_CONFIG --modversion sentencepiece`"], [SentencePiece has no version function])
AC_DEFINE_UNQUOTED([FD_CONFIGURED_CC], ["$CC"], [compiler this was configured with])
])

# FDHPC_CUDA
# The CUDA backend: nvcc of a toolkit, and the libraries cudart, cuBLASLt, cuDNN 9, NVRTC (cuDNN compiles with it at run time) and NCCL 2.18, each
# looked for by itself: in the toolkit, in /usr, where the compiler looks anyway, and in the folders of nvidia/* Python wheels. Built where
# all is found; --with-cuda makes what is missing an error. No library needs the driver to start: they open libcuda.so.1 when first used.
# Sets NVCC, NVCC_ARCH, NVCCFLAGS, CUDA_ARCH, CUDA_CPPFLAGS, CUDA_LDFLAGS, CUDA_LIBS and the conditional CUDA; and the conditional EMULATE, which
# needs the toolkit's headers only: kernels are then tested on the CPU.
AC_DEFUN([FDHPC_CUDA], [
AC_ARG_WITH([cuda],
    [AS_HELP_STRING([--with-cuda@<:@=DIR@:>@], [build the CUDA backend; the toolkit is under DIR @<:@default: if all it needs is found@:>@])],
    [], [with_cuda=check])
AC_ARG_WITH([cuda-arch],
    [AS_HELP_STRING([--with-cuda-arch=LIST], [GPU architectures to build for, commas between them @<:@80,90a@:>@])],
    [], [with_cuda_arch=80,90a])
AC_ARG_WITH([cuda-wheels],
    [AS_HELP_STRING([--with-cuda-wheels=DIR],
        [site-packages folder with nvidia/* wheels, for libraries that the toolkit lacks @<:@default: ask python3@:>@])],
    [], [with_cuda_wheels=check])
AC_ARG_VAR([NVCC], [CUDA compiler])
AC_ARG_VAR([NVCCFLAGS], [CUDA compiler flags])
AC_ARG_VAR([CUDNN_ROOT], [folder with include/ and lib/ of cuDNN, if it is in none of the usual places])
AC_ARG_VAR([NCCL_ROOT], [folder with include/ and lib/ of NCCL, if it is in none of the usual places])
fdhpc_cuda=no fdhpc_cuda_why= fdhpc_cuda_more= fdhpc_cuda_dir= fdhpc_cuda_ldflags= fdhpc_cuda_early= fdhpc_cuda_late=
AC_SUBST([NVCC_ARCH]) AC_SUBST([CUDA_ARCH]) AC_SUBST([CUDA_HEADERS]) AC_SUBST([CUDA_CPPFLAGS]) AC_SUBST([CUDA_LDFLAGS]) AC_SUBST([CUDA_LIBS])
AS_CASE([`uname -m`], [x86_64], [fdhpc_cuda_target=x86_64-linux fdhpc_multiarch=x86_64-linux-gnu],
    [aarch64], [fdhpc_cuda_target=sbsa-linux fdhpc_multiarch=aarch64-linux-gnu], [fdhpc_cuda_target=none fdhpc_multiarch=none])

# the list of architectures: 80, 90a, sm_90a; commas or blanks between them
for a in `echo "$with_cuda_arch" | tr , ' '`; do
    a=`echo "$a" | $SED 's/^sm_//; s/^compute_//'`
    AS_IF([echo "$a" | grep -Eq '^@<:@1-9@:>@@<:@0-9@:>@@<:@0-9@:>@?@<:@af@:>@?$'], [CUDA_ARCH="$CUDA_ARCH $a"],
        [AC_MSG_ERROR([--with-cuda-arch=$with_cuda_arch: "$a" is no architecture; wanted a list like 80,90a (A100: 80, H100 and H200: 90a)])])
    AS_IF([test "`echo "$a" | tr -d af`" -lt 80], [AC_MSG_ERROR([--with-cuda-arch=$with_cuda_arch: sm_$a has no bf16; at least 80 is needed])])
done
CUDA_ARCH=`echo $CUDA_ARCH`
AS_IF([test -z "$CUDA_ARCH"], [AC_MSG_ERROR([--with-cuda-arch=$with_cuda_arch: no architecture; wanted a list like 80,90a])])

# the folder of the wheels: site-packages/nvidia
fdhpc_wheels=
AS_CASE([$with_cuda_wheels],
    [no], [],
    [yes|check], [AS_IF([test "$with_cuda" != no],
        [fdhpc_wheels=`${PYTHON-python3} -c 'import nvidia; print(list(nvidia.__path__)@<:@0@:>@)' 2>/dev/null`])
     AS_IF([test "$with_cuda_wheels" = yes && test -z "$fdhpc_wheels"],
        [AC_MSG_ERROR([--with-cuda-wheels: ${PYTHON-python3} finds no package nvidia; name its folder: --with-cuda-wheels=DIR])])],
    [AS_IF([test -d "$with_cuda_wheels/nvidia"], [fdhpc_wheels=$with_cuda_wheels/nvidia],
        [test -d "$with_cuda_wheels/nccl" || test -d "$with_cuda_wheels/cudnn" || test -d "$with_cuda_wheels/cu13"], [fdhpc_wheels=$with_cuda_wheels],
        [AC_MSG_ERROR([--with-cuda-wheels=$with_cuda_wheels: holds no folder nvidia; wanted a site-packages folder])])
     fdhpc_wheels=`cd "$fdhpc_wheels" && pwd`])

AS_IF([test -z "$fdhpc_wheels"], [fdhpc_no_wheels=" and in no Python wheels (--with-cuda-wheels=DIR)"], [fdhpc_no_wheels=])

AS_IF([test "$with_cuda" != no], [
    AC_MSG_CHECKING([for nvcc])
    AS_CASE([$with_cuda],
        [yes|check], [fdhpc_cuda_try="$CUDA_HOME $CUDA_PATH /usr/local/cuda /opt/cuda /usr/lib/cuda /usr"
            for d in $CUDA_HOME $CUDA_PATH; do
                AS_IF([test -z "$NVCC" && test -x "$d/bin/nvcc"], [NVCC=$d/bin/nvcc])
            done
            AS_IF([test -z "$NVCC"], [NVCC=`command -v nvcc 2>/dev/null`])],
        [fdhpc_cuda_try=$with_cuda
         AS_IF([test ! -d "$with_cuda"], [AC_MSG_ERROR([--with-cuda=$with_cuda: there is no such folder])])])
    AS_IF([test -z "$NVCC"],
        [for d in $fdhpc_cuda_try; do
            AS_IF([test -x "$d/bin/nvcc"], [NVCC=$d/bin/nvcc; break])
         done])
    AC_MSG_RESULT([${NVCC:-no}])
    AS_IF([test -z "$NVCC"],
        [fdhpc_cuda_why="no nvcc" fdhpc_cuda_more="looked for bin/nvcc in `AS_CASE([$with_cuda], [yes|check], [AS_ECHO(["PATH, "])])``echo $fdhpc_cuda_try | $SED 's/  */, /g'`: install the CUDA toolkit, or give --with-cuda=DIR"],
        [FDHPC_CUDA_TOOLKIT])
    AS_IF([test -n "$fdhpc_cuda_why" && test "$with_cuda" != check],
        [AC_MSG_ERROR([--with-cuda was given, but: $fdhpc_cuda_why; $fdhpc_cuda_more])],
        [test -n "$fdhpc_cuda_why" && test "$with_cuda_arch" != 80,90a],
        [AC_MSG_ERROR([--with-cuda-arch=$with_cuda_arch was given, but: $fdhpc_cuda_why; $fdhpc_cuda_more])],
        [test -n "$fdhpc_cuda_why" && test -n "$NVCC"],
        [AC_MSG_WARN([$NVCC is here, but the CUDA backend is not built: $fdhpc_cuda_why; $fdhpc_cuda_more])])
    AS_IF([test -z "$fdhpc_cuda_why"], [fdhpc_cuda=yes])
], [fdhpc_cuda_why="--without-cuda was given"])
AS_IF([test $fdhpc_cuda = yes],
    [fdhpc_version="$fdhpc_nvcc_version for `echo $CUDA_ARCH | $SED 's/@<:@^ @:>@@<:@^ @:>@*/sm_&/g'`"
     fdhpc_cuda_what="the GPU backend: $fdhpc_cuda_dir, $fdhpc_cuda_versions"],
    [CUDA_LDFLAGS= CUDA_LIBS= CUDA_CPPFLAGS=
     fdhpc_version="no: $fdhpc_cuda_why" fdhpc_cuda_what="the GPU backend"])
AM_CONDITIONAL([CUDA], [test $fdhpc_cuda = yes])
for d in $fdhpc_cuda_dir $CUDA_HOME $CUDA_PATH /usr/local/cuda /opt/cuda /usr/lib/cuda /usr ${fdhpc_wheels:+$fdhpc_wheels/cu13 $fdhpc_wheels/cuda_runtime}; do
    for i in "$d/include" "$d/targets/$fdhpc_cuda_target/include"; do
        # all that tests/emulate includes; the wheel of the runtime has cuda_bf16.h, but needs that of crt/
        AS_IF([test -z "$CUDA_HEADERS" && test -f "$i/cuda_bf16.h"],
            [printf '#include <cuda_runtime_api.h>\n#include <cuda_bf16.h>\n#include <vector_functions.h>\n' >conftest.cc
             AS_IF([$CXX -isystem "$i" -fsyntax-only conftest.cc >&AS_MESSAGE_LOG_FD 2>&1], [CUDA_HEADERS=$i])
             rm -f conftest.cc])
    done
done
AM_CONDITIONAL([EMULATE], [test -n "$CUDA_HEADERS" && test `uname -m` = x86_64])
FDHPC_ROW([CUDA], [$fdhpc_version], [$fdhpc_cuda_what])
])

# The toolkit around $NVCC, its libraries, and a program of all of them that is linked and run. Sets fdhpc_cuda_why to what is missing.
AC_DEFUN([FDHPC_CUDA_TOOLKIT], [
: >conftest.cu
# nvcc says where its toolkit is, even if it is a wrapper (HPC SDK) or a link (/etc/alternatives)
fdhpc_cuda_dir=`$NVCC -dryrun -c conftest.cu -o conftest_cu.$ac_objext 2>&1 | $SED -n 's/^#\\$ TOP=//p'`
AS_IF([test -n "$fdhpc_cuda_dir" && test -d "$fdhpc_cuda_dir"], [], [fdhpc_cuda_dir=`dirname "$NVCC"`/..])
fdhpc_cuda_dir=`cd "$fdhpc_cuda_dir" && pwd`
fdhpc_cuda_roots="$fdhpc_cuda_dir"
AS_IF([test -d "$with_cuda" && test "$with_cuda" != "$fdhpc_cuda_dir"], [fdhpc_cuda_roots="$with_cuda $fdhpc_cuda_roots"])
AS_IF([test "$fdhpc_cuda_dir" != /usr], [fdhpc_cuda_roots="$fdhpc_cuda_roots /usr"])
for i in "$fdhpc_cuda_dir/include" "$fdhpc_cuda_dir/targets/$fdhpc_cuda_target/include"; do
    AS_IF([test -f "$i/cuda_runtime_api.h" && test "$i" != /usr/include], [CUDA_CPPFLAGS="-isystem $i"; break])
done
: ${NVCCFLAGS=-O3 -lineinfo}
AS_IF([test "$enable_werror" = yes], [NVCCFLAGS="$NVCCFLAGS --Werror=all-warnings"])
fdhpc_nvcc_version=`$NVCC --version 2>/dev/null | $SED -n 's/.*release \(@<:@0-9.@:>@*\).*/\1/p'`
# names of wheels: nvidia-cublas-cu12, nvidia-cublas; but nvidia-nccl-cu12, nvidia-nccl-cu13
fdhpc_cu=`echo "$fdhpc_nvcc_version" | $SED 's/\..*//'`
AS_IF([test "$fdhpc_cu" = 12], [fdhpc_cu_suffix=-cu12], [fdhpc_cu_suffix=])
# -gencode, not -arch=sm_90a: the latter also compiles for plain sm_90, which has no wgmma
fdhpc_gpu_code=`$NVCC --list-gpu-code 2>/dev/null | tr '\n' ' '`
for a in $CUDA_ARCH; do
    NVCC_ARCH="$NVCC_ARCH -gencode=arch=compute_$a,code=sm_$a"
    AS_CASE([" $fdhpc_gpu_code "], ["  "|*" sm_`echo $a | tr -d af` "*], [],
        [fdhpc_cuda_why="nvcc $fdhpc_nvcc_version does not know sm_$a" fdhpc_cuda_more="it knows: $fdhpc_gpu_code(--with-cuda-arch)"])
done
AS_IF([test -z "$fdhpc_cuda_why"], [
    AC_MSG_CHECKING([whether nvcc compiles for $CUDA_ARCH])
    cat >conftest.cu <<'_FDHPC'
#include <cuda_bf16.h>
extern "C" __global__ void k(__nv_bfloat16 *x) { x[[threadIdx.x]] = __float2bfloat16(1.0f); }
extern "C" int launch(__nv_bfloat16 *x) { k<<<1, 32>>>(x); return (int)cudaGetLastError(); }
_FDHPC
    AS_IF([$NVCC $NVCCFLAGS $NVCC_ARCH -c conftest.cu -o conftest_cu.$ac_objext >conftest.err 2>&1], [AC_MSG_RESULT([yes])],
        [AC_MSG_RESULT([no])
         cat conftest.err >&AS_MESSAGE_LOG_FD
         fdhpc_cuda_why="$NVCC does not compile"
         fdhpc_cuda_more="`grep -m 1 -iE 'error|fatal|unsupported' conftest.err || head -n 1 conftest.err`; more in config.log (a host compiler that nvcc takes: NVCCFLAGS='-O3 -lineinfo -ccbin g++-12')"])
])
rm -f conftest.err
AS_IF([test -z "$fdhpc_cuda_why"], [
    FDHPC_CUDA_PART([the CUDA runtime], [], [cuda_runtime_api.h], [cudart], [CUDART_VERSION < 11080], [cu13 cuda_runtime],
        [it (NVIDIA's packages: cuda-cudart-dev; wheel: nvidia-cuda-runtime$fdhpc_cu_suffix)])
    FDHPC_CUDA_PART([cuBLASLt], [], [cublasLt.h], [cublasLt], [0], [cu13 cublas],
        [it (NVIDIA's packages: libcublas-dev; wheel: nvidia-cublas$fdhpc_cu_suffix)])
    FDHPC_CUDA_PART([NVRTC], [], [nvrtc.h], [nvrtc], [0], [cu13 cuda_nvrtc],
        [it (NVIDIA's packages: cuda-nvrtc-dev; wheel: nvidia-cuda-nvrtc$fdhpc_cu_suffix)])
    FDHPC_CUDA_PART([cuDNN 9], [CUDNN_ROOT], [cudnn.h], [cudnn], [CUDNN_VERSION < 90000], [cudnn],
        [it (NVIDIA's packages: cudnn9-cuda-$fdhpc_cu; wheel: nvidia-cudnn-cu$fdhpc_cu; or set CUDNN_ROOT)])
    FDHPC_CUDA_PART([NCCL 2.18], [NCCL_ROOT], [nccl.h], [nccl], [NCCL_VERSION_CODE < 21800], [nccl],
        [it (NVIDIA's packages: libnccl-dev; wheel: nvidia-nccl-cu$fdhpc_cu; or set NCCL_ROOT)])
])
AS_IF([test -z "$fdhpc_cuda_why"], [
    # folders of one library before the toolkit's, which may hold an older one; folders of several behind it
    CUDA_CPPFLAGS="$fdhpc_cuda_early $CUDA_CPPFLAGS $fdhpc_cuda_late"
    CUDA_LDFLAGS=$fdhpc_cuda_ldflags
    # nvcc's objects are C++ ones (__cxa_guard_acquire and the like)
    CUDA_LIBS="$CUDA_LIBS -lstdc++"
    fdhpc_save_CPPFLAGS=$CPPFLAGS fdhpc_save_LIBS=$LIBS fdhpc_save_LDFLAGS=$LDFLAGS
    CPPFLAGS="$CPPFLAGS $CUDA_CPPFLAGS" LDFLAGS="$LDFLAGS $CUDA_LDFLAGS" LIBS="conftest_cu.$ac_objext $CUDA_LIBS $LIBS"
    AC_MSG_CHECKING([whether a program with the CUDA libraries starts])
    fdhpc_cuda_versions=
    # the versions that are loaded must be at least those of the headers, in the first number the same
    AC_RUN_IFELSE([AC_LANG_PROGRAM([[#include <cublasLt.h>
#include <cudnn.h>
#include <nccl.h>
#include <nvrtc.h>
#include <stdio.h>
int launch(void *);]], [[int nccl = 0, major = 0, minor = 0;
FILE *f = fopen("conftest.versions", "w");
size_t blas = cublasLtGetVersion(), cudnn = cudnnGetVersion(), of = cudnnGetCudartVersion();
if (!f || ncclGetVersion(&nccl) != ncclSuccess || nvrtcVersion(&major, &minor) != NVRTC_SUCCESS) return 2;
if (nccl < 0) return launch(0);
fprintf(f, "runtime %d.%d, cuBLASLt %d.%d, cuDNN %d.%d.%d for CUDA %d, NCCL %d.%d.%d", CUDART_VERSION / 1000, CUDART_VERSION / 10 % 100, (int)(blas / 10000),
        (int)(blas / 100 % 100), (int)(cudnn / 10000), (int)(cudnn / 100 % 100), (int)(cudnn % 100), (int)(of / 1000), nccl / 10000,
        nccl / 100 % 100, nccl % 100);
fclose(f);
if (cudnn / 10000 != CUDNN_MAJOR || of / 1000 != CUDART_VERSION / 1000 || blas / 10000 != CUBLAS_VER_MAJOR || major != CUDART_VERSION / 1000) return 3;]])],
        [fdhpc_cuda_versions=`cat conftest.versions`
         AC_MSG_RESULT([$fdhpc_cuda_versions])],
        [AC_MSG_RESULT([no])
         fdhpc_cuda_why="a program with the CUDA libraries does not link or start"
         AS_IF([test -s conftest.versions], [fdhpc_cuda_why="the CUDA libraries do not match: `cat conftest.versions`"])
         fdhpc_cuda_more="they are$fdhpc_cuda_found; more in config.log"],
        [fdhpc_cuda_versions="libraries not tried"
         AC_MSG_RESULT([not tried, cross compiling])])
    CPPFLAGS=$fdhpc_save_CPPFLAGS LIBS=$fdhpc_save_LIBS LDFLAGS=$fdhpc_save_LDFLAGS
])
rm -f conftest.cu conftest_cu.$ac_objext conftest.versions
])

# FDHPC_CUDA_PART(NAME, ROOT VARIABLE, HEADER, LIBRARY, IT IS TOO OLD IF, FOLDERS IN nvidia/, WHAT TO INSTALL)
# Adds the library by its full name to CUDA_LIBS (a wheel has no libx.so, only libx.so.9) and its folders to the search paths.
AC_DEFUN([FDHPC_CUDA_PART], [
AS_IF([test -z "$fdhpc_cuda_why"], [
    AC_MSG_CHECKING([for $1])
    fdhpc_part= fdhpc_part_seen=
    fdhpc_part_roots="$fdhpc_cuda_roots m4_foreach_w([w], [$6], [${fdhpc_wheels:+$fdhpc_wheels/w} ])"
    m4_ifval([$2], [AS_IF([test -n "$$2"], [fdhpc_part_roots=$$2])
    ])for d in $fdhpc_part_roots; do
        fdhpc_part_include= fdhpc_part_lib=
        for i in "$d/include" "$d/targets/$fdhpc_cuda_target/include"; do
            AS_IF([test -z "$fdhpc_part_include" && test -f "$i/$3"], [fdhpc_part_include=$i])
        done
        for i in "$d/lib64" "$d/lib" "$d/targets/$fdhpc_cuda_target/lib" "$d/lib/$fdhpc_multiarch"; do
            for f in "$i/lib$4.so" "$i/lib$4.so".@<:@0-9@:>@*; do
                AS_IF([test -z "$fdhpc_part_lib" && test -f "$f"], [fdhpc_part_lib=$f])
            done
        done
        AS_IF([test -z "$fdhpc_part_include" && test -z "$fdhpc_part_lib"], [continue])
        AS_IF([test -z "$fdhpc_part_include"], [fdhpc_part_seen="$fdhpc_part_seen ($fdhpc_part_lib is there, but no $3)"; continue])
        AS_IF([test -z "$fdhpc_part_lib"], [fdhpc_part_seen="$fdhpc_part_seen ($fdhpc_part_include/$3 is there, but no lib$4.so)"; continue])
        printf '#include <%s>\n#if %s\n#error too old\n#endif\n' '$3' '$5' >conftest.c
        AS_IF([$CC -E $CPPFLAGS -isystem "$fdhpc_part_include" $CUDA_CPPFLAGS $fdhpc_cuda_late conftest.c >/dev/null 2>&AS_MESSAGE_LOG_FD],
            [fdhpc_part=$d; break],
            [fdhpc_part_seen="$fdhpc_part_seen ($fdhpc_part_include/$3 is too old)"])
    done
    rm -f conftest.c
    # by CPATH and LIBRARY_PATH, CPPFLAGS and LDFLAGS: then the loader must know its place too
    AS_IF([test -z "$fdhpc_part" m4_ifval([$2], [&& test -z "$$2"])],
        [fdhpc_save_LIBS=$LIBS LIBS="-l$4 $LIBS"
         AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <$3>
#if $5
#error too old
#endif]], [[]])], [fdhpc_part=/usr fdhpc_part_lib=-l$4])
         LIBS=$fdhpc_save_LIBS])
    AS_IF([test -n "$fdhpc_part"], [AC_MSG_RESULT([$fdhpc_part_lib])], [AC_MSG_RESULT([no])])
    AS_IF([test -z "$fdhpc_part"],
        [fdhpc_cuda_why="$1 was not found"
         fdhpc_cuda_more="looked in `echo $fdhpc_part_roots | $SED 's/  */, /g'`$fdhpc_part_seen$fdhpc_no_wheels: install $7"],
        [fdhpc_part_dir=`dirname "$fdhpc_part_lib"`
         fdhpc_cuda_found="$fdhpc_cuda_found $fdhpc_part_lib"
         AS_IF([test "$4" = nvrtc], [CUDA_LIBS="$CUDA_LIBS -Wl,--push-state,--no-as-needed $fdhpc_part_lib -Wl,--pop-state"], [CUDA_LIBS="$CUDA_LIBS $fdhpc_part_lib"])
         AS_IF([test "$fdhpc_part" != /usr && test "$fdhpc_part" != "$fdhpc_cuda_dir"],
            [AS_IF([test "$4" = cudnn || test "$4" = nccl],
                [fdhpc_cuda_early="$fdhpc_cuda_early -isystem $fdhpc_part_include"], [fdhpc_cuda_late="$fdhpc_cuda_late -isystem $fdhpc_part_include"])])
         AS_CASE([" $fdhpc_cuda_ldflags "], [*",$fdhpc_part_dir "*], [],
            [AS_IF([test "$fdhpc_part" != /usr], [fdhpc_cuda_ldflags="$fdhpc_cuda_ldflags -Wl,-rpath,$fdhpc_part_dir"])])])
])
])

AC_DEFUN([FDHPC_SUMMARY], [
AS_ECHO(["
fdhpc $PACKAGE_VERSION is configured: $CC, $CFLAGS
$fdhpc_rows
"])
AS_IF([test -n "$ac_unrecognized_opts"], [AC_MSG_WARN([unrecognised options: $ac_unrecognized_opts])])
])
