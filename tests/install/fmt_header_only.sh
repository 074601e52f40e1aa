#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: fmt_header_only.sh
# Cohort installed with fmt by its headers alone: a program needs no fmt library, by find_package and
# by pkg-config.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  cmake -S "$here/../.." -B "$work/tree" -DCOHORT_FMT_HEADER_ONLY=ON -DCOHORT_CUDA=OFF -DCOHORT_MPI=OFF \
    -DCOHORT_BUILD_TESTS=OFF -DCOHORT_BUILD_EXAMPLES=OFF -DCOHORT_BUILD_BENCH=OFF &&
    cmake --install "$work/tree" --prefix "$work/prefix"
} >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cat >"$work/main.cpp" <<'SOURCE'
#include <cohort/topology.hpp>
int main() {
  try {
    cohort::validate({.tp = 3, .pp = 1, .dcp = 2}, 3);
  } catch (const cohort::ConfigError& error) {
    return error.what()[0] == '\0';
  }
  return 1;
}
SOURCE
cat >"$work/CMakeLists.txt" <<'PROJECT'
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(cohort CONFIG REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE cohort::cohort)
PROJECT
passed=0 failed=0
# judge NAME PROGRAM: it runs, and asks for no fmt library.
judge() {
  if "$2" && ! readelf -d "$2" | grep -q libfmt; then
    passed=$((passed + 1))
  else
    echo "FAILED: $1"
    cat "$work/log"
    failed=$((failed + 1))
  fi
}
{ cmake -S "$work" -B "$work/consumer" "-DCMAKE_PREFIX_PATH=$work/prefix" && cmake --build "$work/consumer"; } >"$work/log" 2>&1
judge "find_package" "$work/consumer/consumer"
flags=$(PKG_CONFIG_PATH=$(dirname "$(find "$work/prefix" -name cohort.pc)") pkg-config --cflags --libs cohort)
g++ -std=c++20 "$work/main.cpp" $flags -o "$work/by_pkg_config" >"$work/log" 2>&1
judge "pkg-config" "$work/by_pkg_config"
echo "cohort-test: passed=$passed failed=$failed skipped=0"
((failed == 0))
