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
# --with-cuda[=DIR] builds the backend: it needs nvcc, cuBLASLt and NCCL. Not the default as long as it has not been run on a GPU.
# Sets NVCC, NVCC_ARCH, NVCCFLAGS, CUDA_CPPFLAGS, CUDA_LDFLAGS, CUDA_LIBS and the conditional CUDA; and the conditional EMULATE, which
# needs the toolkit's headers only: kernels are then tested on the CPU.
AC_DEFUN([FDHPC_CUDA], [
AC_ARG_WITH([cuda],
    [AS_HELP_STRING([--with-cuda@<:@=DIR@:>@], [build the CUDA backend; the toolkit is under DIR @<:@default: no@:>@])],
    [], [with_cuda=no])
AC_ARG_WITH([cuda-arch],
    [AS_HELP_STRING([--with-cuda-arch=LIST], [GPU architectures to build for, commas between them @<:@80,90a@:>@])],
    [], [with_cuda_arch=80,90a])
AC_ARG_VAR([NVCC], [CUDA compiler])
AC_ARG_VAR([NVCCFLAGS], [CUDA compiler flags])
AC_ARG_VAR([NCCL_ROOT], [folder with include/ and lib/ of NCCL, if not in the toolkit's])
fdhpc_cuda=no fdhpc_cuda_why=
AC_SUBST([NVCC_ARCH]) AC_SUBST([CUDA_HEADERS]) AC_SUBST([CUDA_CPPFLAGS]) AC_SUBST([CUDA_LDFLAGS]) AC_SUBST([CUDA_LIBS])

AS_IF([test "$with_cuda" != no], [
    fdhpc_cuda_dir=
    AS_CASE([$with_cuda],
        [yes|check], [fdhpc_cuda_try="$CUDA_HOME $CUDA_PATH /usr/local/cuda /usr/lib/cuda /usr"],
        [fdhpc_cuda_try=$with_cuda])
    AC_MSG_CHECKING([for the CUDA toolkit])
    AS_IF([test -n "$NVCC"],
        [fdhpc_cuda_dir=`dirname "$NVCC"`; fdhpc_cuda_dir=`dirname "$fdhpc_cuda_dir"`],
        [for d in $fdhpc_cuda_try; do
            AS_IF([test -x "$d/bin/nvcc"], [fdhpc_cuda_dir=$d NVCC=$d/bin/nvcc; break])
         done])
    AS_IF([test -z "$NVCC"], [AC_MSG_RESULT([no]); fdhpc_cuda_why="no nvcc"],
        [AC_MSG_RESULT([$fdhpc_cuda_dir])
         fdhpc_cuda_lib=$fdhpc_cuda_dir/lib64
         test -d "$fdhpc_cuda_lib" || fdhpc_cuda_lib=$fdhpc_cuda_dir/lib
         CUDA_CPPFLAGS="-isystem $fdhpc_cuda_dir/include"
         CUDA_LDFLAGS="-L$fdhpc_cuda_lib -Wl,-rpath,$fdhpc_cuda_lib"
         for d in "$NCCL_ROOT"; do
            AS_IF([test -n "$d"],
                [CUDA_CPPFLAGS="-isystem $d/include $CUDA_CPPFLAGS"
                 CUDA_LDFLAGS="-L$d/lib -Wl,-rpath,$d/lib $CUDA_LDFLAGS"])
         done
         # nvcc's objects are C++ ones (__cxa_guard_acquire and the like)
         CUDA_LIBS="-lnccl -lcublasLt -lcudnn -lcudart -lstdc++"
         for a in `echo "$with_cuda_arch" | tr , ' '`; do
            # -gencode, not -arch=sm_90a: the latter also compiles for plain sm_90,
            # which has no wgmma.
            NVCC_ARCH="$NVCC_ARCH -gencode=arch=compute_$a,code=sm_$a"
         done
         : ${NVCCFLAGS=-O3 -lineinfo}

         AC_MSG_CHECKING([whether $NVCC compiles for $with_cuda_arch])
         cat >conftest.cu <<'_FDHPC'
#include <cuda_bf16.h>
extern "C" __global__ void k(__nv_bfloat16 *x) { x[[threadIdx.x]] = __float2bfloat16(1.0f); }
extern "C" int launch(__nv_bfloat16 *x) { k<<<1, 32>>>(x); return (int)cudaGetLastError(); }
_FDHPC
         AS_IF([AC_TRY_COMMAND([$NVCC $NVCCFLAGS $NVCC_ARCH $CUDA_CPPFLAGS -c conftest.cu -o conftest_cu.$ac_objext 1>&AS_MESSAGE_LOG_FD 2>&1])],
            [AC_MSG_RESULT([yes])
             fdhpc_save_CPPFLAGS=$CPPFLAGS fdhpc_save_LIBS=$LIBS fdhpc_save_LDFLAGS=$LDFLAGS
             CPPFLAGS="$CPPFLAGS $CUDA_CPPFLAGS" LDFLAGS="$LDFLAGS $CUDA_LDFLAGS"
             LIBS="conftest_cu.$ac_objext $CUDA_LIBS $LIBS"
             AC_MSG_CHECKING([for cuBLASLt, cuDNN 9 and NCCL 2.18])
             AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <cublasLt.h>
#include <nccl.h>
#include <cudnn_graph.h>
#if NCCL_VERSION_CODE < 21800 || CUDNN_VERSION < 90000
#error too old
#endif
int launch(void *);]], [[int v; return (int)cublasLtGetVersion() + (int)cudnnGetVersion() + ncclGetVersion(&v) + launch(0);]])],
                [AC_MSG_RESULT([yes]); fdhpc_cuda=yes],
                [AC_MSG_RESULT([no]); fdhpc_cuda_why="cuBLASLt, cuDNN or NCCL missing or too old"])
             CPPFLAGS=$fdhpc_save_CPPFLAGS LIBS=$fdhpc_save_LIBS LDFLAGS=$fdhpc_save_LDFLAGS],
            [AC_MSG_RESULT([no]); fdhpc_cuda_why="$NVCC does not work"])
         rm -f conftest.cu conftest_cu.$ac_objext
        ])
    AS_IF([test $fdhpc_cuda = no && test "$with_cuda" != check],
        [AC_MSG_ERROR([--with-cuda was given, but: $fdhpc_cuda_why])])
])
AS_IF([test $fdhpc_cuda = yes],
    [fdhpc_version="$fdhpc_cuda_dir, for $with_cuda_arch"],
    [CUDA_LDFLAGS= CUDA_LIBS=
     fdhpc_version="no (--with-cuda=DIR)"])
AM_CONDITIONAL([CUDA], [test $fdhpc_cuda = yes])
for d in $CUDA_HOME $CUDA_PATH $fdhpc_cuda_dir /usr/local/cuda /usr/lib/cuda /usr; do
    AS_IF([test -z "$CUDA_HEADERS" && test -f "$d/include/cuda_bf16.h"], [CUDA_HEADERS=$d/include])
done
AM_CONDITIONAL([EMULATE], [test -f "$CUDA_HEADERS/cuda_bf16.h" && test `uname -m` = x86_64])
FDHPC_ROW([CUDA], [$fdhpc_version], [the GPU backend])
])

AC_DEFUN([FDHPC_SUMMARY], [
AS_ECHO(["
fdhpc $PACKAGE_VERSION is configured: $CC, $CFLAGS
$fdhpc_rows
"])
AS_IF([test -n "$ac_unrecognized_opts"], [AC_MSG_WARN([unrecognised options: $ac_unrecognized_opts])])
])
