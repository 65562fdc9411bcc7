#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The run-time libraries of dynamically linked programs, for a machine that has none of them and no network.
#
#   pack.sh [-C] DIR PROGRAM...
#
# Run on Debian 12 (amd64). DIR/root gets Open MPI with mpirun, parallel HDF5, libconfig, oneDNN, SentencePiece, libarchive, JPEG, PNG, WebP, Jansson
# and what they need beyond a bare Ubuntu 24.04; DIR/env.sh is to be sourced there. Libraries of CUDA are not packed: env.sh finds them in that
# machine's toolkit or in its nvidia/* wheels. Each PROGRAM's own libraries are checked against the pack.
#
#   -C   bundle the real libcurl and libxml2 (with ICU, Kerberos and LDAP, about 17 MiB more) in place of stand-ins. HDF5 needs the first for
#        s3:// files, libarchive the second for xar archives; fdhpc uses neither.
set -euo pipefail
export LC_ALL=C

die() { echo "pack.sh: $*" >&2; exit 1; }
say() { echo "pack.sh: $*"; }

real=0
while getopts C opt; do
    case $opt in
    C) real=1 ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || { sed -n '3,12s/^# \{0,1\}//p' "$0"; exit 2; }

[ "$(dpkg --print-architecture)" = amd64 ] || die "amd64 only"
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fdhpc-pack
lib=usr/lib/x86_64-linux-gnu

# ---- packages --------------------------------------------------------------

mpi="libopenmpi3 openmpi-bin openmpi-common libpmix2 libmunge2 libhwloc15
     libevent-core-2.1-7 libevent-pthreads-2.1-7"
hdf5="libhdf5-openmpi-103-1 libhdf5-openmpi-hl-100 libsz2 libaec0"
other="libconfig9 libsentencepiece0 libarchive13 libjpeg62-turbo libpng16-16 libwebp7 libwebpdemux2 libjansson4"
dnnl="libdnnl2 ocl-icd-libopencl1"
# Only used where the machine itself lacks them; see 'fallback' below.
common="libgomp1 libssl3 libnettle8 libacl1 liblzma5 libzstd1 liblz4-1 libbz2-1.0
        zlib1g libudev1"
full="libcurl4 libxml2 libicu72 libnghttp2-14 libidn2-0 libunistring2 librtmp1 libssh2-1
      libpsl5 libgssapi-krb5-2 libkrb5-3 libk5crypto3 libkrb5support0 libcom-err2
      libkeyutils1 libldap-2.5-0 libsasl2-2 libbrotli1 libgnutls30 libhogweed6 libgmp10
      libp11-kit0 libtasn1-6 libffi8"

pkgs="$mpi $hdf5 $other $dnnl $common"
[ $real = 0 ] || pkgs="$pkgs $full"

mkdir -p "$cache"
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
trap 'say "failed at line $LINENO"' ERR
say "fetching $(echo $pkgs | wc -w) packages"
uris=$(apt-get -o APT::Sandbox::User=root download --print-uris $pkgs) ||
    die "apt-get knows not all of these packages: apt-get update; Debian 12?"
missing=()
for p in $pkgs; do
    # 'URI' file size hash
    f=$(awk -v p="${p}_" 'index($2, p) == 1 { print $2; exit }' <<< "$uris")
    [ -n "$f" ] || die "no file name for $p"
    [ -s "$cache/$f" ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
    (cd "$cache" && apt-get -qq -o APT::Sandbox::User=root download "${missing[@]}")
fi
for p in $pkgs; do
    f=$(awk -v p="${p}_" 'index($2, p) == 1 { print $2; exit }' <<< "$uris")
    dpkg -x "$cache/$f" "$tree/raw"
done
raw=$tree/raw

# ---- layout ----------------------------------------------------------------
# root/usr        Open MPI as Debian lays it out (its paths derive from OPAL_PREFIX)
# root/lib        everything else that goes on LD_LIBRARY_PATH
# root/fallback   libraries used only if the machine has none of that name

root=$tree/root
mkdir -p "$root"/{bin,lib,fallback} "$root/$lib" "$root/usr/bin" "$root/usr/share" "$root/etc/openmpi"
cp -a "$raw/usr/bin/orterun" "$raw/usr/bin/orted" "$root/usr/bin/"
[ ! -e "$raw/usr/bin/ompi_info" ] || cp -a "$raw/usr/bin/ompi_info" "$root/usr/bin/"
ln -s orterun "$root/usr/bin/mpirun"
ln -s orterun "$root/usr/bin/mpiexec"
mkdir -p "$root/$lib/openmpi/lib"
cp -a "$raw/$lib/openmpi/lib/openmpi3" "$root/$lib/openmpi/lib/"
cp -a "$raw/usr/share/openmpi" "$root/usr/share/"
rm -rf "$root/usr/share/openmpi"/*wrapper-data* "$root/usr/share/openmpi"/*.fmt
if [ -d "$raw/$lib/pmix2" ]; then
    mkdir -p "$root/$lib/pmix2/lib" "$root/$lib/pmix2/share"
    cp -a "$raw/$lib/pmix2/lib/pmix" "$root/$lib/pmix2/lib/" 2>/dev/null || true
    cp -a "$raw/$lib/pmix2/share/pmix" "$root/$lib/pmix2/share/" 2>/dev/null || true
fi

# soname -> one real file named by its soname
place() { # file destination
    local so
    so=$({ objdump -p "$1" 2>/dev/null || true; } | awk '$1 == "SONAME" { print $2 }')
    [ -n "$so" ] || return 0
    cp -L "$1" "$2/$so"
    chmod 755 "$2/$so"
}
fallback_re='^(libgomp|libcrypto|libssl|libnettle|libhogweed|libacl|liblzma|libzstd|liblz4|libbz2|libz|libudev|libOpenCL|libcurl|libxml2|libicu|libnghttp2|libidn2|libunistring|librtmp|libssh2|libpsl|libgssapi_krb5|libkrb5|libk5crypto|libkrb5support|libcom_err|libkeyutils|libldap|liblber|libsasl2|libbrotli|libgnutls|libgmp|libp11-kit|libtasn1|libffi)[-.0-9_a-z]*\.so'
find "$raw/$lib" "$raw/lib/x86_64-linux-gnu" -maxdepth 2 -name '*.so*' ! -path '*/openmpi3/*' 2>/dev/null |
while read -r f; do
    case $f in
    *-gdb.py|*/libicutest*|*/libicutu*|*/libicuio*|*/liboshmem*|*/libmpi_mpifh*|*/libmpi_usempi*|*/libmpi_java*|\
*/libmpi_cxx*|*/libompitrace*|*_common_ofi*|*_common_ucx*|*_common_verbs*|*_common_monitoring*|*/libhdf5_openmpi_*fortran*)
        continue ;;
    */pkgconfig/*|*/gconv/*|*/engines-3/*|*/ossl-modules/*) continue ;;
    esac
    [ -f "$f" ] || continue
    b=$(basename "$f")
    if [[ $b =~ $fallback_re ]]; then place "$f" "$root/fallback"; else place "$f" "$root/lib"; fi
done

# ---- stand-ins -------------------------------------------------------------
# A library of the right name, with the symbol versions its one user asks for,
# whose every function returns 0.
stub() { # soname user-library
    local so=$1 user=$2 c m
    c=$tree/stub.c m=$tree/stub.map
    objdump -T "$user" | awk -v so="$so" '
        BEGIN { while ((("objdump -p '"'$user'"'") | getline l) > 0) {
                    if (l ~ /required from/) { split(l, a, " "); cur = a[3]; sub(":$", "", cur) }
                    else if (l ~ /^ +0x/ && cur == so) { n = split(l, a, " "); ver[a[n]] = 1 } } }
        /\*UND\*/ { v = $(NF-1); gsub(/[()]/, "", v); if (v in ver) print v, $NF }' | sort -u > "$tree/stub.sym"
    [ -s "$tree/stub.sym" ] || die "$user asks nothing of $so"
    awk '{ print "long " $2 "(void) { return 0; }" }' "$tree/stub.sym" > "$c"
    awk '{ s[$1] = s[$1] " " $2 ";" } END { for (v in s) print v " {" s[v] " };" }' "$tree/stub.sym" > "$m"
    cc -shared -fPIC -w -O1 -fno-builtin -nostdlib -Wl,-soname,"$so" -Wl,--version-script="$m" \
        -o "$root/fallback/$so" "$c"
}
if [ $real = 0 ]; then
    stub libcurl.so.4 "$root/lib/libhdf5_openmpi.so.103"
    stub libxml2.so.2 "$root/lib/libarchive.so.13"
fi

# ---- prune -----------------------------------------------------------------
# The parts of the C library, the compiler's run time and the loader: from the machine.
base='^(ld-linux-x86-64\.so\.2|lib(c|m|dl|rt|pthread|resolv|util|gcc_s|stdc\+\+)\.so\.[0-9]+)$'
have() { [ -e "$root/lib/$1" ] || [ -e "$root/fallback/$1" ] || [[ $1 =~ $base ]]; }
needed() { { objdump -p "$1" 2>/dev/null || true; } | awk '$1 == "NEEDED" { print $2 }'; }

# Open MPI loads what it finds in this folder: drop what cannot load or is of no use
# on one machine, so that it need not say so at each start.
comps=$root/$lib/openmpi/lib/openmpi3
( cd "$comps" && rm -f *.la *.a mca_btl_usnic* mca_btl_openib* mca_btl_ofi* mca_btl_uct* mca_mtl_* mca_pml_ucx* \
    mca_pml_monitoring* mca_coll_monitoring* mca_osc_monitoring* mca_osc_ucx* mca_atomic_* mca_memheap_* \
    mca_scoll_* mca_spml_* mca_sshmem_* mca_crs_* mca_plm_slurm* mca_ras_slurm* mca_ras_simulator* mca_ess_slurm* \
    mca_schizo_slurm* mca_reachable_netlink* mca_fs_lustre* mca_patcher_linux_* mca_snapc_* mca_vprotocol_* \
    mca_pml_v.so mca_pml_cm.so mca_rmaps_mindist* mca_dfs_* mca_pmix_flux* mca_coll_sync* )
for f in "$comps"/*.so; do
    for n in $(needed "$f"); do
        have "$n" || { say "dropping $(basename "$f"): no $n"; rm -f "$f"; break; }
    done
done
: > "$root/etc/openmpi/openmpi-mca-params.conf"
: > "$root/etc/openmpi/openmpi-default-hostfile"

# What nothing needs
keepers=$tree/keepers
{
    for p in libmpi.so.40 libopen-rte.so.40 libopen-pal.so.40 libhdf5_openmpi.so.103 libhdf5_openmpi_hl.so.100 \
        libconfig.so.9 libsentencepiece.so.0 libarchive.so.13 libjpeg.so.62 libpng16.so.16 libjansson.so.4 libdnnl.so.2; do
        echo "$p"
    done
    for b in "$@"; do needed "$b"; done
    find "$root/usr" -type f | while read -r f; do needed "$f"; done
} | sort -u > "$keepers"
while :; do
    n=$(wc -l < "$keepers")
    while read -r so; do
        echo "$so"
        for d in lib fallback; do [ ! -e "$root/$d/$so" ] || needed "$root/$d/$so"; done
    done < "$keepers" | sort -u > "$keepers.new"
    mv "$keepers.new" "$keepers"
    [ "$(wc -l < "$keepers")" != "$n" ] || break
done
for f in "$root"/lib/* "$root"/fallback/*; do
    grep -qxF "$(basename "$f")" "$keepers" || { rm -f "$f"; }
done
find "$root" -type f -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true

# ---- check -----------------------------------------------------------------
cuda='^lib(cuda|cudart|cublas|cublasLt|cudnn|cudnn_graph|nccl|nvrtc|nvJitLink|curand)\.so'
bad=0
check() {
    local n
    for n in $(needed "$1"); do
        have "$n" || [[ $n =~ $cuda ]] || { say "$(basename "$1") needs $n, which is not in the pack"; bad=1; }
    done
}
while read -r f; do check "$f"; done < <(find "$root" -type f \( -name '*.so*' -o -path '*/bin/*' \))

for b in "$@"; do check "$b"; done
[ $bad = 0 ] || die "incomplete"

newest() { # prefix program...: the highest symbol version asked for
    local prefix=$1
    shift
    { find "$root" -type f \( -name '*.so*' -o -path '*/bin/*' \); printf '%s\n' "$@"; } |
        while read -r f; do objdump -T "$f" 2>/dev/null || true; done |
        grep -oE "\(${prefix}[0-9.]+\)|[ ]${prefix}[0-9.]+ " | grep -oE '[0-9.]+' | sort -Vu | tail -1
}
glibc=$(newest GLIBC_ "$@") cxx=$(newest GLIBCXX_ "$@")
say "newest symbols asked for: GLIBC_$glibc GLIBCXX_${cxx:-none} (Ubuntu 24.04 has 2.39 and 3.4.33)"
[ "$(printf '%s\n2.39\n' "$glibc" | sort -V | tail -1)" = 2.39 ] || die "GLIBC_$glibc is newer than 2.39"

rm -rf "$out/root"
cp -a "$root" "$out/root"
cp "$(dirname "$0")/env.sh" "$out/env.sh"
say "$(find "$root" -name '*.so*' -type f | wc -l) libraries, $(($(du -sk "$root" | cut -f1) / 1024)) MiB"
