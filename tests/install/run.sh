#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: run.sh BUILD-TREE
# Installs the tree to a temporary folder, moves it, and builds against it: the README's program by
# the README's CMakeLists.txt, and the consumer with each compiler and standard, with find_package and
# with pkg-config, also without run-time type information; in the long run with all pairs of compiler
# and standard. Then the tree inside another project, by add_subdirectory and by FetchContent.
set -euo pipefail
build=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source "$here/../../cmake/mpi_env.sh"

# Programs without debug information, which names their sources.
cmake --install "$build" --prefix "$work/first" --strip >"$work/log" || { cat "$work/log"; exit 1; }
mv "$work/first" "$work/installed"  # nothing may refer to where it was installed first
# But for the archive, in which the debug information of this build type stays.
if grep -rl --exclude=libcohort_cuda.a "$work/first\|$(cd "$here/../.." && pwd)/include" "$work/installed"; then
  echo "FAILED: the installed files above name the source or the first prefix"
  exit 1
fi
prefix=$work/installed
pc_dir=$(dirname "$(find "$prefix" -name cohort.pc)")

# shellcheck source=tests/install/attempt.sh
source "$here/attempt.sh"

with_find_package() {  # COMPILER STANDARD MPI [FLAGS]
  local tree=$work/$1-$2-$3
  cmake -S "$here" -B "$tree" "-DCMAKE_PREFIX_PATH=$prefix" "-DCMAKE_CXX_COMPILER=$1" \
    "-DCMAKE_CXX_STANDARD=$2" "-DWITH_MPI=$3" "-DCMAKE_CXX_FLAGS=${4:-}" &&
    cmake --build "$tree" -j 2 && "$tree/consumer"
}

# What the README says about a project of its own, to the letter but for the flags, which are those of
# users whose own warnings are errors.
by_the_readme() {
  local project=$work/readme
  mkdir "$project"
  awk '/^```cmake$/ { inside = 1; next } /^```/ { if (inside) exit } inside' \
    "$here/../../README.md" >"$project/CMakeLists.txt"
  cp "$here/../../examples/first_program.cpp" "$project/engine.cpp"
  cmake -S "$project" -B "$project/build" "-DCMAKE_PREFIX_PATH=$prefix" -DCMAKE_CXX_COMPILER=g++ \
    "-DCMAKE_CXX_FLAGS=$warnings" &&
    cmake --build "$project/build" && mpirun -n 2 "$project/build/engine" | tee "$work/said" &&
    grep -q '^merged (2,4,8) = 0.5 with plan ' "$work/said"
}

inside_a_project() {  # WAY
  local tree=$work/$1
  cmake -S "$here/inside" -B "$tree" "-DWAY=$1" "-DCOHORT_SOURCE=$here/../.." "-DWITH_MPI=$mpi" \
    -DCMAKE_CXX_COMPILER=g++ &&
    cmake --build "$tree" -j 2 && "$tree/core" && { [[ $mpi == OFF ]] || "$tree/mpi"; } || return
  # The engine's sources get Cohort's folder and no flags of Cohort's own.
  if grep -- 'inside/core.cpp' "$tree/compile_commands.json" | grep -qE -- '-W|-O|-g'; then
    echo "flags reached the engine's source"
    return 1
  fi
}

with_pkg_config() {  # COMPILER STANDARD
  local flags
  flags=$(PKG_CONFIG_PATH=$pc_dir pkg-config --cflags --libs cohort) &&
    "$1" "-std=$2" -Wall -Wextra "$here/main.cpp" "$here/groups.cpp" $flags -o "$work/pc-$1" &&
    "$work/pc-$1"
}

# Groups without run-time type information are built without MPI; the long run builds them with it too.
with_pkg_config_mpi() {  # COMPILER STANDARD
  local flags sources=("$here/inside/mpi.cpp")
  [[ $full == 0 ]] || sources=("$here/main.cpp" "$here/groups.cpp")
  flags=$(PKG_CONFIG_PATH=$pc_dir pkg-config --cflags --libs cohort-mpi) &&
    "$1" "-std=$2" -fno-rtti -Wall -Wextra -DWITH_MPI "${sources[@]}" $flags -o "$work/pc-mpi-$1" &&
    "$work/pc-mpi-$1"
}

# The README's program and the consumer, compiled as one for each FLAG, as by users whose own warnings
# are errors. What g++ finds in the headers depends on how far its optimizer goes; what clang++ finds
# does not.
no_warnings_by() {  # COMPILER FLAG...
  local compiler=$1 package=cohort-mpi sources=(-include "$here/groups.cpp" "$here/../../examples/first_program.cpp")
  shift
  [[ $mpi == ON ]] || { package=cohort; sources=("$here/groups.cpp"); }
  local flags flag job running=() status=0
  flags=$(PKG_CONFIG_PATH=$pc_dir pkg-config --cflags "$package") || return
  for flag in "$@"; do
    # shellcheck disable=SC2086
    "$compiler" -std=c++20 "$flag" $warnings $flags -c "${sources[@]}" -o "$work/$compiler$flag.o" &
    running+=($!)
  done
  for job in "${running[@]}"; do
    wait "$job" || status=1
  done
  return $status
}

unknown_component_is_refused() {
  cat >"$work/CMakeLists.txt" <<'PROJECT'
cmake_minimum_required(VERSION 3.25)
project(refused LANGUAGES CXX)
find_package(cohort CONFIG COMPONENTS telepathy)
if(cohort_FOUND)
  message(FATAL_ERROR "a component that does not exist was found")
endif()
PROJECT
  cmake -S "$work" -B "$work/refused" "-DCMAKE_PREFIX_PATH=$prefix"
}

warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
mpi=OFF
[[ -e $pc_dir/cohort-mpi.pc ]] && mpi=ON
compilers=(g++)
if command -v clang++ >/dev/null; then
  compilers+=(clang++)
else
  echo "cohort-skip: install: clang++ is not installed"
fi
full=${COHORT_TEST_FULL:-0}
if [[ $mpi == ON ]]; then
  attempt "the README's project" by_the_readme
else
  attempt "g++, C++20" with_find_package g++ 20 OFF
fi
for compiler in "${compilers[@]:1}"; do
  attempt "$compiler, C++23" with_find_package "$compiler" 23 "$mpi"
  [[ $full == 0 ]] || attempt "$compiler, C++20" with_find_package "$compiler" 20 "$mpi"
done
[[ $full == 0 ]] || attempt "g++, C++23" with_find_package g++ 23 "$mpi"
[[ $mpi == OFF ]] || attempt "g++ without MPI and without RTTI" with_find_package g++ 20 OFF -fno-rtti
[[ $mpi == ON && $full == 0 ]] || attempt "pkg-config" with_pkg_config g++ c++20
[[ $mpi == OFF ]] || attempt "pkg-config with MPI, without RTTI" with_pkg_config_mpi g++ c++20
attempt "no warnings by g++" no_warnings_by g++ -O2 -O3  # at -O0 the README's project is built
for compiler in "${compilers[@]:1}"; do
  attempt "no warnings by $compiler" no_warnings_by "$compiler" -fsyntax-only
  # Its front end finds what it finds.
  [[ $full == 0 ]] || attempt "no warnings by $compiler at each level" no_warnings_by "$compiler" -O0 -O2 -O3
done
for way in add_subdirectory FetchContent; do
  attempt "inside a project by $way" inside_a_project "$way"
done
attempt "unknown component" unknown_component_is_refused

skips=$((2 - ${#compilers[@]}))
echo "cohort-test: passed=$passed failed=$failed skipped=$skips"
((failed == 0))
