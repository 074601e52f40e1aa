#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the project needs from Debian 12 or Ubuntu 24.04.
#
#   bash cmake/deps.sh            compiler, CMake, MPI, libraries
#   bash cmake/deps.sh --tests    and what the test suite uses where it is there (a second compiler,
#                                 the formatter, Doxygen, network namespaces)
#   bash cmake/deps.sh --full     and what only the long test run uses
#
# Looks for programs and headers, not for packages, so other sources of them are as good; asks apt
# only when something is missing. As root it installs; otherwise it prints the command and stops.
set -euo pipefail
source "$(dirname "$0")/command_line.sh"
help_if_asked "$@"
level=${1:-}

# Package, then what proves that it is there: programs, or headers with a slash or an .hpp ending.
required=(
  "g++ g++"
  "cmake cmake"
  "ninja-build ninja"
  "pkg-config pkg-config"
  "libopenmpi-dev mpicxx"
  "openmpi-bin mpirun"
  "libfmt-dev fmt/format.h"
  "catch2 catch2/catch.hpp,catch2/catch_all.hpp"
  "libcli11-dev CLI/CLI.hpp"
  "nlohmann-json3-dev nlohmann/json.hpp"
)
useful=()
case $level in
  "") ;;
  --tests) useful+=("clang clang++" "clang-format-14 clang-format-14" "doxygen doxygen" "iproute2 ip" "util-linux unshare" "procps ps") ;;
  --full)
    useful+=("clang clang++" "clang-format-14 clang-format-14" "doxygen doxygen" "iproute2 ip" "util-linux unshare" "procps ps"
      "clang-tidy clang-tidy")
    ;;
  *) refuse "$level" ;;
esac

is_there() {  # any of a comma-separated list
  local proof folder
  for proof in ${1//,/ }; do
    if [[ $proof == */* ]]; then
      for folder in /usr/include /usr/local/include ${CMAKE_PREFIX_PATH:+"${CMAKE_PREFIX_PATH%%[:;]*}/include"}; do
        [[ -e $folder/$proof ]] && return 0
      done
    else
      PATH=$PATH:/usr/sbin:/sbin command -v "$proof" >/dev/null && return 0
    fi
  done
  return 1
}

# missing ENTRY...: the packages whose proof is not found.
missing() {
  local entry
  for entry in "$@"; do
    is_there "${entry#* }" || echo "${entry%% *}"
  done
}

mapfile -t missing_required < <(missing "${required[@]}")
mapfile -t missing_useful < <([[ ${#useful[@]} == 0 ]] || missing "${useful[@]}")
packages=("${missing_required[@]}" "${missing_useful[@]}")
[[ ${#packages[@]} == 0 ]] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "cohort: missing, by their Debian names: ${packages[*]}" >&2
elif [[ $(id -u) == 0 ]]; then
  echo "cohort: installing ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  install=(apt-get install -y --no-install-recommends -o Dpkg::Use-Pty=0)
  # Package lists may be absent or older than the mirror; a few packages may not exist everywhere.
  apt-get update -qq || echo "cohort: apt-get update failed; trying with the lists that are there" >&2
  if [[ ${#missing_required[@]} != 0 ]]; then
    "${install[@]}" "${missing_required[@]}" || true
  fi
  if [[ ${#missing_useful[@]} != 0 ]]; then
    "${install[@]}" "${missing_useful[@]}" ||
      for package in "${missing_useful[@]}"; do "${install[@]}" "$package" || true; done
  fi
else
  echo "cohort: missing packages. Install them with" >&2
  echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${packages[*]}" >&2
fi

mapfile -t missing_required < <(missing "${required[@]}")
if [[ ${#missing_required[@]} != 0 ]]; then
  echo "cohort: cannot build without: ${missing_required[*]}" >&2
  exit 1
fi
# What is only useful leaves checks out, and the suite says which.
exit 0
