#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: run.sh BUILD-TREE NCCL-LIBRARY
# The part for cards from an installed tree, by find_package, which must find the NCCL that the
# library was built with, and by pkg-config, there without run-time type information.
set -uo pipefail
build=$1
library=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# shellcheck source=tests/install/attempt.sh
source "$here/../attempt.sh"

with_find_package() {
  cmake -S "$here" -B "$work/tree" "-DCMAKE_PREFIX_PATH=$work/prefix" >"$work/configured" &&
    cat "$work/configured" && grep -q "NCCL of the package: $library\$" "$work/configured" &&
    cmake --build "$work/tree" && "$work/tree/consumer"
}
with_pkg_config() {
  local flags
  flags=$(PKG_CONFIG_PATH=$(dirname "$(find "$work/prefix" -name cohort-cuda.pc)") pkg-config --cflags --libs cohort-cuda) &&
    g++ -std=c++20 -fno-rtti "$here/main.cpp" $flags -o "$work/consumer" &&
    LD_LIBRARY_PATH=$(dirname "$library"):${LD_LIBRARY_PATH:-} "$work/consumer"
}

cmake --install "$build" --prefix "$work/prefix" >"$work/log" || { cat "$work/log"; exit 1; }
attempt "find_package" with_find_package
attempt "pkg-config" with_pkg_config
echo "cohort-test: passed=$passed failed=$failed skipped=0"
((failed == 0))
