#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Packages of Debian 12 that building and testing need, installed in one call where that is possible; else those that are
# missing are named. Used by jobs/quickstart.sh and tests/run.sh.
wanted="gcc g++ make autoconf automake pkg-config openmpi-bin libopenmpi-dev libhdf5-openmpi-dev hdf5-tools libdnnl-dev
    libconfig-dev libjansson-dev libarchive-dev libjpeg62-turbo-dev libpng-dev libwebp-dev libsentencepiece-dev liblapacke-dev
    librandom123-dev libcmocka-dev"

if ! command -v dpkg-query >/dev/null; then
    echo "packages: no dpkg here; ./configure will name what is missing"
    exit 0
fi
missing=
for package in $wanted; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "packages: all are installed"
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "packages: these are missing, and only root may install them:"
    echo "  apt-get install$missing"
    exit 1
fi
echo "packages: installing$missing"
DEBIAN_FRONTEND=noninteractive
export DEBIAN_FRONTEND
apt-get -q update >/dev/null && apt-get -q install -y --no-install-recommends $missing >/dev/null || {
    echo "packages: apt-get install failed:$missing"
    exit 1
}
