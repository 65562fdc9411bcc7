# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced in bash on the GPU machine, in the unpacked pack:  . ./env.sh
# It points the loader, Open MPI and PMIx at the libraries beside it (made by pack.sh), and finds CUDA's libraries: those of a Python
# environment (nvidia/* wheels), or a toolkit's. DEVICE_PYTHON: which Python; CUDA_HOME: which toolkit.

device_src=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
device_root=$device_src/root
if [ ! -e "$device_root/.ready" ]; then
    # Of the libraries that most machines have, use ours only where this one has none.
    device_cache=$( (ldconfig -p || /sbin/ldconfig -p) 2>/dev/null)
    for device_f in "$device_root"/fallback/*; do
        device_so=${device_f##*/}
        case $device_cache in
        *"	$device_so "*) ;;
        *) ln -sf "../fallback/$device_so" "$device_root/lib/$device_so" ;;
        esac
    done
    : > "$device_root/.ready"
fi

# device_path DIR: put DIR last on LD_LIBRARY_PATH, once
device_path() {
    case ":${LD_LIBRARY_PATH-}:" in
    *":$1:"*) ;;
    *) LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$1 ;;
    esac
}

# device_find SONAME DIR...: where the loader or one of the folders has it
device_find() {
    local so=$1 d p
    shift
    for d; do
        [ ! -e "$d/$so" ] || { echo "$d/$so"; return 0; }
    done
    p=$( (ldconfig -p || /sbin/ldconfig -p) 2>/dev/null | awk -v so="$so" '$1 == so { print $NF; exit }')
    [ -z "$p" ] || { echo "$p"; return 0; }
    return 1
}

device_path "$device_root/lib"

# CUDA: a Python environment's packages first (they are of one set), then a toolkit.
device_cuda_dirs=
for device_py in "${DEVICE_PYTHON:-python3}" python3; do
    device_cuda_dirs=$("$device_py" - 2>/dev/null <<'PY'
import glob, os, site, sys, sysconfig
seen = []
for d in [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages(), *sys.path]:
    for l in sorted(glob.glob(os.path.join(d, "nvidia", "*", "lib"))):
        if l not in seen and glob.glob(os.path.join(l, "*.so*")):
            seen.append(l)
print("\n".join(seen))
PY
) || device_cuda_dirs=
    [ -z "$device_cuda_dirs" ] || break
done
for device_d in "${CUDA_HOME-}" /usr/local/cuda; do
    for device_e in "$device_d/lib64" "$device_d/targets/x86_64-linux/lib"; do
        [ ! -d "$device_e" ] || device_cuda_dirs="$device_cuda_dirs
$device_e"
    done
done
mapfile -t device_cuda_dirs < <(printf '%s\n' "$device_cuda_dirs" | grep .)
device_missing=
for device_so in libcudart.so.13 libcublasLt.so.13 libcublas.so.13 libcudnn.so.9 libcudnn_graph.so.9 libnccl.so.2 \
    libnvrtc.so.13; do
    if device_p=$(device_find "$device_so" "${device_cuda_dirs[@]}"); then
        case $device_so in
        libcudnn.so.9) DEVICE_CUDNN=$device_p ;;
        libnccl.so.2) DEVICE_NCCL=$device_p ;;
        libcublasLt.so.13) DEVICE_CUBLASLT=$device_p ;;
        esac
        case $device_p in
        /lib/*|/usr/lib/*) ;;
        *) device_path "$(dirname "$device_p")" ;;
        esac
    else
        device_missing="$device_missing $device_so"
    fi
done
# The driver's own library, where it is mounted and not in the loader's cache
for device_d in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
    [ ! -e "$device_d/libcuda.so.1" ] || { device_path "$device_d"; break; }
done
if [ -z "${CUDA_HOME-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then
    CUDA_HOME=/usr/local/cuda
    export CUDA_HOME
fi
export LD_LIBRARY_PATH DEVICE_CUDNN DEVICE_NCCL DEVICE_CUBLASLT

# Open MPI and PMIx: moved, one machine, perhaps as root, no ssh, no network.
# Anything already set is left alone.
export OPAL_PREFIX=$device_root/usr
export OPAL_SYSCONFDIR=$device_root/etc/openmpi
export PMIX_INSTALL_PREFIX=$device_root/usr/lib/x86_64-linux-gnu/pmix2
export PMIX_LIBDIR=$PMIX_INSTALL_PREFIX/lib PMIX_PKGLIBDIR=$PMIX_INSTALL_PREFIX/lib/pmix
export PMIX_DATADIR=$PMIX_INSTALL_PREFIX/share PMIX_PKGDATADIR=$PMIX_INSTALL_PREFIX/share/pmix
export PATH=$device_root/usr/bin:$PATH
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
device_default() { [ -n "${!1-}" ] || export "$1=$2"; }
device_default OMPI_MCA_plm isolated                  # no ssh or rsh to look for
device_default OMPI_MCA_ess_singleton_isolated 1      # a program started without mpirun
device_default OMPI_MCA_pml ob1
device_default OMPI_MCA_btl self,vader                # self,tcp if /dev/shm is no use
device_default OMPI_MCA_btl_vader_single_copy_mechanism none # no ptrace rights needed
device_default OMPI_MCA_oob_tcp_if_include lo
device_default OMPI_MCA_hwloc_base_binding_policy none
device_default OMPI_MCA_rmaps_base_oversubscribe 1
device_default OMPI_MCA_orte_tmpdir_base "${TMPDIR:-/tmp}"
device_default PMIX_MCA_psec native                   # no munge
device_default PMIX_MCA_gds hash
device_default HWLOC_HIDE_ERRORS 2
device_default NCCL_SOCKET_IFNAME lo

# mpirun talks to its processes over the loopback interface
if [ -r /sys/class/net/lo/flags ] && [ $(($(cat /sys/class/net/lo/flags) & 1)) = 0 ]; then
    ip link set lo up 2>/dev/null || ifconfig lo up 2>/dev/null || python3 - 2>/dev/null <<'PY' ||
import fcntl, socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
r = struct.pack("16sh14x", b"lo", 0)
flags = struct.unpack("16sh14x", fcntl.ioctl(s, 0x8913, r))[1]
fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))
PY
        echo "device: the loopback interface is down: mpirun will fail" >&2
fi

echo "device: root $device_root; cudnn ${DEVICE_CUDNN:-none}; nccl ${DEVICE_NCCL:-none};" \
    "cublasLt ${DEVICE_CUBLASLT:-none}${device_missing:+; not found:$device_missing}" >&2
