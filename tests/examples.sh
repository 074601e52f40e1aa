#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: examples.sh BIN
# Runs every command that a README shows in a console block and compares what it prints with the
# block. BIN takes the place of build/host/bin. In a block, "…" stands for any text, and a line of its
# own for any lines. Also: the README's first program is examples/first_program.cpp.
set -uo pipefail
cd "$(dirname "$0")/.."
source cmake/mpi_env.sh
bin=$1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0 compared=0 skipped=0
fail() {
  echo "examples: $*"
  failures=$((failures + 1))
}

# split_blocks FILE NAME: the console blocks of a file as $work/NAME.1, .2, ..., the command first.
split_blocks() {
  awk -v prefix="$work/$2." '
    /^```console$/ { inside = 1; count++; next }
    /^\$ source cmake\/mpi_env.sh$/ { next }  # this script has done so
    /^```/ { inside = 0 }
    inside { print > (prefix count) }' "$1"
}

# matches ACTUAL EXPECTED: files of lines.
matches() {
  local -a actual patterns
  mapfile -t actual <"$1"
  mapfile -t patterns < <(sed 's/[][\\*?]/\\&/g; s/…/*/g' "$2")
  local i=0 j=0
  while ((i < ${#patterns[@]})); do
    if [[ ${patterns[i]} == '*' ]]; then
      i=$((i + 1))
      ((i == ${#patterns[@]})) && return 0
      # shellcheck disable=SC2053
      while ((j < ${#actual[@]})) && [[ ${actual[j]} != ${patterns[i]} ]]; do j=$((j + 1)); done
    fi
    # shellcheck disable=SC2053
    ((j < ${#actual[@]})) && [[ ${actual[j]} == ${patterns[i]} ]] || return 1
    i=$((i + 1)) j=$((j + 1))
  done
  ((j == ${#actual[@]}))
}

check_block() {
  local block=$1 command program
  command=$(sed -n '1s/^\$ //p' "$block")
  case $command in
    "bash tests/run.sh"*) return ;; # this test is part of it
    "bash examples/demo.sh") command="mpirun -n 4 build/host/bin/dcp_decode" ;; # what it runs in the end
  esac
  command=${command//build\/host\/bin/$bin}
  program=$(grep -o "$bin/[a-z_]*" <<<"$command" | head -n 1)
  if [[ -z $program ]]; then
    fail "$block: a console block without a program: $command"
    return
  fi
  if [[ ! -x $program ]]; then
    echo "examples: ${program##*/} was not built"
    skipped=$((skipped + 1))
    return
  fi
  tail -n +2 "$block" >"$work/expected"
  timeout --kill-after=5 120 bash -c "$command" </dev/null >"$work/actual" 2>"$work/errors"
  compared=$((compared + 1))
  matches "$work/actual" "$work/expected" && return
  fail "$command does not print what block ${block##*.} of the README (${block##*/}) says"
  diff "$work/expected" "$work/actual"
  cat "$work/errors"
}

split_blocks README.md top
split_blocks examples/README.md examples
for block in "$work"/top.* "$work"/examples.*; do
  check_block "$block"
done

awk '/^```cpp$/ && !done { inside = 1; next } /^```/ { if (inside) done = 1; inside = 0 } inside' \
  README.md >"$work/first_program.cpp"
diff "$work/first_program.cpp" <(tail -n +2 examples/first_program.cpp) ||  # without the licence's line
  fail "the first program of README.md is not examples/first_program.cpp"

echo "examples: $compared commands compared, $skipped not built, $failures failures"
((failures == 0)) || exit 1
if ((compared == 0)); then
  echo "cohort-skip: examples: none was built"
  exit 77
fi
