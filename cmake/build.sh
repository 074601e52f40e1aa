#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Configures a preset and builds it, or only some targets of it.
#
#   bash cmake/build.sh PRESET [TARGET...]         presets: host, gpu, clang, asan, tsan
#   bash cmake/build.sh host dcp_decode
#
# Exit status 3: the GPU parts cannot be built here; the last line says why. COHORT_WERROR=ON makes
# warnings errors; COHORT_QUICK=ON builds sooner, for programs whose speed does not matter;
# COHORT_HOST_TESTS=ON builds with the preset gpu also the tests that need no GPU;
# CUDAARCHS='80;90' builds the preset gpu for other cards than those of compute capability 9.0.
set -euo pipefail
cd "$(dirname "$0")/.."
source cmake/command_line.sh
help_if_asked "$@"
preset=${1:-PRESET}
grep -q "\"name\": \"$preset\", \"configurePreset\"" CMakePresets.json || refuse "$preset"
shift

mkdir -p build
options=("-DCOHORT_WARNINGS_AS_ERRORS=${COHORT_WERROR:-OFF}"
  "-DCOHORT_QUICK_BUILD=${COHORT_QUICK:-OFF}")
if [[ ! -e build/$preset/CMakeCache.txt ]] && command -v ninja >/dev/null; then
  options+=(-G Ninja)
fi
# Whether CUDA and NCCL are there is CMake's to find out, and no error where a script asks.
if [[ $preset == gpu ]]; then
  options+=(-DCOHORT_CUDA=AUTO "-DCOHORT_BUILD_HOST_TESTS=${COHORT_HOST_TESTS:-OFF}"
    ${CUDAARCHS:+"-DCMAKE_CUDA_ARCHITECTURES=$CUDAARCHS"})
fi

log=build/$preset.configure.log
cmake --preset "$preset" "${options[@]}" >"$log" 2>&1 || { cat "$log"; exit 1; }
if [[ $preset == gpu ]] && ! grep -q '^-- cohort::cuda: CUDA' "$log"; then
  sed -n 's/^-- cohort::cuda: not built (\(.*\))$/\1/p' "$log"
  exit 3
fi
grep '^-- cohort::' "$log" || true

# The compiler goes on after an error, so that one report holds all of them.
keep_going=(-k)
[[ -e build/$preset/build.ninja ]] && keep_going=(-k 0)
exec cmake --build "build/$preset" -j "$(nproc)" ${1:+--target "$@"} -- "${keep_going[@]}"
