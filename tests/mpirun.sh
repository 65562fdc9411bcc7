#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# mpirun.sh PROGRAM [ARG...] - start a test on NP ranks (default 2; 3 if its name ends in _3ranks).
[ -n "$MPIRUN" ] || { echo "no mpirun"; exit 77; }
if [ "$(id -u)" = 0 ]; then
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM
fi
OMPI_MCA_rmaps_base_oversubscribe=1
OMPI_MCA_btl_vader_single_copy_mechanism=none
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMPI_MCA_rmaps_base_oversubscribe OMPI_MCA_btl_vader_single_copy_mechanism OMP_NUM_THREADS
# the kernels that an emulated test launches, for tests/emulate/test_coverage.sh
case $1 in */emulate/*|emulate/*) FD_EMU_LAUNCHED=$1.launched; export FD_EMU_LAUNCHED; rm -f "$1.launched" ;; esac
case $1 in *_3ranks) NP=${NP:-3} ;; esac
exec "$MPIRUN" -n "${NP:-2}" "$@"
