#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: run.sh NCCL-INCLUDE-FOLDER NCCL-LIBRARY
# Cohort inside a project that has CUDA sources of another standard, a fmt and an NCCL of its own, by
# FetchContent, which is configured, and by add_subdirectory, which is built. The short run builds the engine's kernel and the lightest of the library's sources, for one card; the
# long one everything, for all cards of the default.
set -euo pipefail
include=$1
library=$2
full=${COHORT_TEST_FULL:-0}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
architectures=()
[[ $full == 1 ]] || architectures=(-DCMAKE_CUDA_ARCHITECTURES=90)
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc)

configure() {  # TREE WAY
  cmake -S "$here" -B "$1" "-DWAY=$2" "${generator[@]}" "${architectures[@]}" "-DCMAKE_CUDA_COMPILER=$nvcc" \
    "-DCOHORT_SOURCE=$here/../../.." "-DENGINE_NCCL_INCLUDE=$include" "-DENGINE_NCCL_LIBRARY=$library" \
    >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}
configure "$work/fetched" FetchContent
configure "$work/tree" add_subdirectory
commands=$work/tree/compile_commands.json
command_of() { grep '"command"' "$commands" | grep -- "$1"; }
fail() { echo "FAILED: $1"; command_of "${2:-}" || true; exit 1; }

command_of support_kernels.cu | grep -q -- '-std=c++20' || fail "the library's standard" support_kernels.cu
command_of support_kernels.cu | grep -q -- '-std=c++17' && fail "the parent's standard" support_kernels.cu
command_of parent/kernel.cu | grep -qE -- '-std=c\+\+20|FMT_(CONSTEVAL|USE)|relaxed-constexpr' && fail "flags" parent/kernel.cu
if [[ $full == 1 ]]; then
  command_of support_kernels.cu | grep -q 'compute_80.*compute_90.*compute_100' || fail "cards" support_kernels.cu
  cmake --build "$work/tree" -j "$(nproc)" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  "$work/tree/engine"
elif [[ ${#generator[@]} != 0 ]]; then
  ninja -C "$work/tree" cohort/src/CMakeFiles/cohort_cuda.dir/support_kernels.cu.o \
    CMakeFiles/engine.dir/kernel.cu.o >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
fi
echo "cohort-test: passed=2 failed=0 skipped=0"
