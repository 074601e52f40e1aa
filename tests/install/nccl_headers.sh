#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: nccl_headers.sh COMPILER-FLAG...
# The library's headers against those of every NCCL: the transport's is compiled with nccl.h of each
# release, which its wheel brings. And <cohort/cuda.hpp>, which needs none. The flags are those of a source that uses cohort::cuda, less NCCL's
# include folder. COHORT_NCCL_WHEELS is a folder that keeps unpacked wheels, as VERSION/nvidia/nccl;
# what is not there is asked of pip. The short run takes what the folder has of one old and one new
# release, and asks nobody.
set -uo pipefail
full=${COHORT_TEST_FULL:-0}
wheels=${COHORT_NCCL_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/cohort-nccl-wheels}
releases=(2.19.3 2.32.3)
[[ $full == 1 ]] && releases=(2.19.3 2.20.5 2.21.5 2.22.3 2.23.4 2.24.3 2.25.1 2.26.2 2.27.3 2.28.3 2.28.9
  2.29.2 2.29.7 2.30.3 2.30.7 2.31.2 2.32.3)
passed=0 failed=0 skipped=0

# fetch VERSION: the header alone stays; a wheel's library has hundreds of megabytes.
fetch() {
  local version=$1 work
  work=$(mktemp -d "$wheels/fetch.XXXXXX") || return 1
  timeout 300 python3 -m pip download -q --no-deps --no-cache-dir --only-binary=:all: --dest "$work" \
    --platform manylinux2014_x86_64 --platform manylinux_2_18_x86_64 "nvidia-nccl-cu12==$version" \
    >"$work/log" 2>&1 &&
    python3 -m zipfile -e "$work"/*.whl "$work/all" >>"$work/log" 2>&1 &&
    mkdir -p "$wheels/$version/nvidia/nccl" &&
    mv "$work/all/nvidia/nccl/include" "$wheels/$version/nvidia/nccl/"
  local status=$?
  rm -rf "$work"
  return $status
}

mkdir -p "$wheels" || exit 77
if "$@" -M -x c++ - <<<'#include <cohort/cuda.hpp>' | grep -o '[^ ]*/nccl\.h'; then
  echo "FAILED: <cohort/cuda.hpp> includes nccl.h"
  failed=1
else
  passed=1
fi
for version in "${releases[@]}"; do
  include=$wheels/$version/nvidia/nccl/include
  if [[ ! -e $include/nccl.h && $full == 1 ]]; then
    fetch "$version"
  fi
  if [[ ! -e $include/nccl.h ]]; then
    echo "cohort-skip: nccl headers: $version is not in $wheels$( [[ $full == 1 ]] && echo ", and pip did not give it")"
    skipped=$((skipped + 1))
  elif output=$("$@" "-I$include" -fsyntax-only -x c++ - <<<'#include <cohort/nccl/nccl_transport.hpp>' 2>&1); then
    passed=$((passed + 1))
  else
    echo "FAILED: NCCL $version"
    head -n 20 <<<"$output"
    failed=$((failed + 1))
  fi
done
echo "cohort-test: passed=$passed failed=$failed skipped=$skipped"
((failed == 0))
