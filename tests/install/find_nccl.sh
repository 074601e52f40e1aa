#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: find_nccl.sh [CMAKE]
# Which header and which library FindNCCL takes, with made-up installations: a header is three lines,
# a library the banner that NCCL's has.
set -euo pipefail
cmake=${1:-cmake}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

header() {  # FOLDER VERSION
  mkdir -p "$1/include"
  local IFS=.
  # shellcheck disable=SC2086  # three words
  printf '#define NCCL_MAJOR %s\n#define NCCL_MINOR %s\n#define NCCL_PATCH %s\n' $2 >"$1/include/nccl.h"
}
library() {  # FILE VERSION
  mkdir -p "$(dirname "$1")"
  printf 'ELF\0NCCL version %s+cuda13.0\0' "$2" >"$1"
}

mkdir "$work/project"
cat >"$work/project/CMakeLists.txt" <<PROJECT
cmake_minimum_required(VERSION 3.25)
project(look LANGUAGES NONE)
list(APPEND CMAKE_MODULE_PATH "$here/../../cmake")
if(OWN_TARGET)
  add_library(NCCL::NCCL INTERFACE IMPORTED)
  set_target_properties(NCCL::NCCL PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "\${OWN_TARGET}/include")
endif()
find_package(NCCL 2.19 QUIET)
message(STATUS "found=\${NCCL_FOUND} version=\${NCCL_VERSION} library=\${NCCL_LIBRARY} mismatch=\${NCCL_MISMATCH}")
PROJECT

passed=0
failed=0
# expect NAME PATTERN CMAKE-ARGUMENT...: configures the tree of the last call anew.
expect() {
  local name=$1 pattern=$2 output
  shift 2
  output=$("$cmake" -S "$work/project" -B "$work/tree" "$@" 2>&1 | grep -- '-- found=' || true)
  if [[ $output =~ $pattern ]]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    printf 'FAILED: %s\n  expected %s\n  got      %s\n' "$name" "$pattern" "$output"
  fi
}

header "$work/wheel" 2.32.3
library "$work/wheel/lib/libnccl.so.2" 2.32.3
header "$work/system" 2.28.9
library "$work/system/lib/libnccl.so" 2.28.9
header "$work/torn" 2.27.7
library "$work/torn/lib/libnccl.so.2" 2.32.3
library "$work/half/lib/libnccl.so.2" 2.32.3
header "$work/old" 2.18.6
library "$work/old/lib/libnccl.so" 2.18.6
others="-DCMAKE_PREFIX_PATH=$work/system"

expect "the folder of a wheel gives header and library" \
  "found=TRUE version=2.32.3 library=$work/wheel/lib/libnccl.so.2 mismatch=\$" \
  "-DNCCL_ROOT=$work/wheel" "$others"
expect "another folder replaces what the last configuration found" \
  "found=TRUE version=2.28.9 library=$work/system/lib/libnccl.so mismatch=\$" \
  "-DNCCL_ROOT=$work/system" "$others"
expect "two halves are refused, and both are named" \
  "found=FALSE .* mismatch=.*2.27.7 .*torn/include/nccl.h.*2.32.3 .*torn/lib/libnccl.so.2" \
  "-DNCCL_ROOT=$work/torn" "$others"
expect "a folder without a header is refused, whatever else there is" "found=FALSE" \
  "-DNCCL_ROOT=$work/half" "$others"
expect "so is a folder that does not exist" "found=FALSE" "-DNCCL_ROOT=$work/nowhere" "$others"
expect "a version that lacks ncclMemAlloc is refused" "found=FALSE" "-DNCCL_ROOT=$work/old" "$others"
expect "without a wish, what the prefix path has" \
  "found=TRUE version=2.28.9 library=$work/system/lib/libnccl.so" -UNCCL_ROOT "$others"
expect "a target that a parent has made is taken" \
  "found=TRUE version=2.32.3 library=NCCL::NCCL" -UNCCL_ROOT "-DOWN_TARGET=$work/wheel"

echo "cohort-test: passed=$passed failed=$failed skipped=0"
((failed == 0))
