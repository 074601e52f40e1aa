#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: command_lines.sh BIN
# Every program of BIN and every script that users start says on --help what it does, with an example,
# and names the right option where one is misspelt. Which there are is taken from the sources.
set -uo pipefail
cd "$(dirname "$0")/.."
source cmake/mpi_env.sh
export PYTHONDONTWRITEBYTECODE=1
bin=$1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
asked=0 absent=0 failures=0
fail() {
  echo "command lines: $*"
  cat "$work/output"
  failures=$((failures + 1))
}

# judge NAME MEANT COMMAND...: MEANT is "near" where a misspelt option gets the right one, "list" where
# it gets the help.
judge() {
  local name=$1 meant=$2 option wrong status=0
  shift 2
  asked=$((asked + 1))
  timeout 60 "$@" --help </dev/null >"$work/output" 2>"$work/errors" || status=$?
  ((status == 0)) || fail "$name --help ends with status $status"
  [[ ! -s $work/errors ]] || { fail "$name --help writes to standard error"; cat "$work/errors"; }
  grep -v '^\(usage:\|Usage:\| *\[\|$\)' "$work/output" | head -n 2 | grep -q '[A-Za-z]\{3,\} [a-z]' || fail "$name --help does not say what it does"
  grep -q "^  .*\b$name\b" "$work/output" || fail "$name --help has no example"

  option=$(grep -o -- '--[a-z][a-z-]*' "$work/output" | grep -v -- '^--help$' | head -n 1)
  option=${option:---help}
  wrong=${option:0:3}${option:4}
  status=0
  timeout 60 "$@" "$wrong" </dev/null >"$work/output" 2>&1 || status=$?
  ((status == 2)) || fail "$name $wrong ends with status $status"
  case $meant in
    near) grep -q -- "$wrong: no such option; did you mean $option?" "$work/output" || fail "$name $wrong does not name $option" ;;
    list) grep -q -- "$wrong: no such option" "$work/output" && grep -q "^  .*\b$name\b" "$work/output" || fail "$name $wrong gets no help" ;;
  esac
}

programs=(cohort_info cohort_trace cohort_bench decode_engine chaos gpu_chaos gpu_own_kernels)
for source in examples/[0-9][0-9]_*.cpp bench/*.cpp tests/fuzz/*_fuzz.cpp; do
  name=$(basename "$source" .cpp)
  case $source in
    examples/*) programs+=("${name#[0-9][0-9]_}") ;;
    bench/*) programs+=("$name") ;;
    *) programs+=("fuzz_${name%_fuzz}") ;;
  esac
done
for program in "${programs[@]}"; do
  if [[ -x $bin/$program ]]; then
    judge "$program" near "$bin/$program"
  else
    echo "command lines: $program was not built"
    absent=$((absent + 1))
  fi
done

for script in cmake/*.sh examples/*.sh bench/*.sh tests/run.sh tests/gpu.sh; do
  head -n 1 "$script" | grep -q '^#!' || continue  # sourced by others
  judge "$(basename "$script")" list bash "$script"
done
if command -v python3 >/dev/null; then
  for script in $(grep -ls -d skip '^#!.*python3' bench/*); do
    judge "$(basename "$script")" near python3 "$script"
  done
else
  echo "cohort-skip: command_lines: python3 is not installed"
fi

# Of several ranks one answers.
if command -v mpirun >/dev/null && [[ -x $bin/groups ]]; then
  for program in groups dcp_decode; do
    [[ -x $bin/$program ]] || continue
    first=$("$bin/$program" --help | head -n 1)
    answers=$(timeout 60 mpirun -n 3 "$bin/$program" --help 2>/dev/null | grep -cxF -- "$first")
    ((answers == 1)) || fail "of 3 ranks of $program --help $answers answered"
  done
fi

echo "command lines: $asked asked, $absent not built, $failures failures"
((failures == 0))
