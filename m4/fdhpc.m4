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

AC_DEFUN([FDHPC_SUMMARY], [
AS_ECHO(["
fdhpc $PACKAGE_VERSION is configured: $CC, $CFLAGS
$fdhpc_rows
"])
AS_IF([test -n "$ac_unrecognized_opts"], [AC_MSG_WARN([unrecognised options: $ac_unrecognized_opts])])
])
