#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: dcp_decode.sh PROGRAM [matrix|full|killed]
# Runs the example dcp_decode and judges it by its last line, its exit status and its output hash.
#   matrix  every layout once or twice, every plan and both bases somewhere (the default)
#   full    every layout with every plan, base, symmetric memory on and off, eager and in a graph
#   killed  a rank is killed in the middle: the job ends within 30 s and leaves nothing behind
# Outputs of `packed` and `one_kernel` must be equal to the bit, whatever else is chosen.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../../cmake/mpi_env.sh"
source "$here/../../cmake/command_line.sh"
help_if_asked "$@"
program=$1 mode=${2:-matrix}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0 runs=0
fail() {
  echo "dcp_decode: $*"
  failures=$((failures + 1))
}

declare -A hashes=()

# judged RANKS ARGUMENT...: the run must pass. The output hash is in $hash.
judged() {
  local ranks=$1 status last
  shift
  runs=$((runs + 1))
  timeout --kill-after=5 120 mpirun -n "$ranks" "$program" --backend host "$@" >"$work/out" 2>"$work/err"
  status=$?
  last=$(tail -n 1 "$work/out")
  hash=$(sed -n 's/^output_hash=//p' "$work/out")
  if [[ $status != 0 || ! $last =~ ^max_rel_error=[0-9.e+-]+\ bound=[0-9.e+-]+\ PASS$ || -z $hash ]]; then
    fail "-n $ranks $*: status $status, last line \"$last\""
    cat "$work/out" "$work/err"
    hash=failed
  fi
}

# same_bits KEY WHAT: all runs with one key must have one output.
same_bits() {
  local first=${hashes[$1]:-}
  if [[ -z $first ]]; then
    hashes[$1]=$hash
  elif [[ $hash != "$first" ]]; then
    fail "$1: $2 gave the outputs $hash, expected the $first of the runs before"
  fi
}

# decode RANKS TP PP DCP HEADS PLAN SYMMETRIC BASE [--graph]
decode() {
  local layout="tp=$2 pp=$3 dcp=$4"
  judged "$1" --tp "$2" --pp "$3" --dcp "$4" --heads "$5" --merge "$6" --symmetric "$7" --lse-base "$8" \
    --steps 5 --context 60 "${@:9}"
  case $6 in
    # With one DCP rank every plan is a copy.
    packed | one_kernel) same_bits "$layout base $8" "$6, symmetric $7 ${*:9}" ;;
  esac
}

layouts=("4 4 1 4 16" "4 4 1 2 16" "4 2 2 2 16" "4 4 1 1 16" "3 3 1 3 9" "8 8 1 8 16" "8 4 2 2 16")

matrix() {
  local layout
  for layout in "${layouts[@]}"; do
    # shellcheck disable=SC2086
    {
      decode $layout packed on e
      decode $layout one_kernel off e --graph
      [[ $layout == 8* ]] || decode $layout staged on 2
    }
  done
  # shellcheck disable=SC2086
  {
    decode ${layouts[0]} automatic on 2 --graph
    decode ${layouts[0]} packed off 2 --graph
    decode ${layouts[0]} one_kernel on 2
    decode ${layouts[2]} staged off e --graph
  }
  refusals
}

full() {
  local layout plan symmetric base
  for layout in "${layouts[@]}"; do
    for base in e 2; do
      for symmetric in on off; do
        for plan in staged packed one_kernel automatic; do
          # shellcheck disable=SC2086
          {
            decode $layout "$plan" "$symmetric" "$base"
            decode $layout "$plan" "$symmetric" "$base" --graph
          }
        done
      done
    done
  done
  decode 16 16 1 8 16 one_kernel on e
  decode 8 8 1 2 16 one_kernel on e
  judged 4 --preset deepseek-v3 --context 256 --steps 3
  refusals
}

# What cannot work is refused by every rank alike, in words.
refusals() {
  local arguments text status
  while IFS='|' read -r arguments text; do
    runs=$((runs + 1))
    # shellcheck disable=SC2086
    timeout --kill-after=5 60 mpirun -n 4 "$program" $arguments </dev/null >"$work/out" 2>&1
    status=$?
    [[ $status == 2 ]] && grep -qF -- "$text" "$work/out" ||
      { fail "$arguments: status $status, expected 2 and \"$text\""; cat "$work/out"; }
  done <<'END'
--tp 3 --dcp 1|needs tp*pp=3 ranks, but the world has 4
--tp 4 --dcp 3|tp=4 must be a multiple of dcp=3
--heads 6|--heads 6: tp=4 ranks must divide them
--value-dim 200|--value-dim 200
--merge fastest|--merge
END
}

# The job's ranks, found by a mark in their environment.
ranks_of_job() {
  local environ exe
  for environ in $(grep -lsz "^COHORT_DCP_DECODE_MARK=$mark\$" /proc/[0-9]*/environ); do
    exe=$(readlink "${environ%/environ}/exe") || continue
    case ${exe##*/} in
      "${program##*/}") echo "${environ//[!0-9]/}" ;;
      mpirun | orterun | orted | prterun | prted) [[ ${1:-} == all ]] && echo "${environ//[!0-9]/}" ;;
    esac
  done
}

killed() {
  mark=$$-$RANDOM$RANDOM
  export COHORT_DCP_DECODE_MARK=$mark
  export TMPDIR=$work/tmp
  mkdir "$TMPDIR"
  touch "$work/start"
  sleep 0.02 # file systems keep time in ticks
  local mapped=$(ls /dev/shm 2>/dev/null | sort)
  timeout --kill-after=5 60 mpirun -n 4 "$program" --backend host --steps 10000000 \
    >"$work/out" 2>"$work/err" &
  local job=$! _
  for _ in $(seq 300); do
    grep -q '^merge:' "$work/out" && break
    sleep 0.1
  done
  grep -q '^merge:' "$work/out" || fail "no step was decoded within 30 s"

  local victims=($(ranks_of_job)) started elapsed status
  ((${#victims[@]} == 4)) || fail "expected 4 ranks, found ${#victims[@]}"
  started=$(date +%s%N)
  kill -KILL "${victims[-1]}"
  wait "$job"
  status=$?
  elapsed=$((($(date +%s%N) - started) / 1000000))
  echo "dcp_decode: the job ended with $status, $elapsed ms after a rank was killed"
  ((status != 0)) || fail "a job that lost a rank must not succeed"
  ((elapsed < 30000)) || fail "the job took $elapsed ms to end, expected at most 30000"
  ! grep -q PASS "$work/out" || fail "a job that lost a rank must not pass"

  local processes files
  for _ in $(seq 50); do
    processes=$(ranks_of_job all)
    files=$(find "$TMPDIR" -mindepth 1; find /tmp /dev/shm -maxdepth 1 -name '*cohort*' -newer "$work/start" 2>/dev/null)
    files+=$(comm -13 <(echo "$mapped") <(ls /dev/shm 2>/dev/null | sort) | while read -r file; do
      grep -qsF "/dev/shm/$file" /proc/[0-9]*/maps || echo "/dev/shm/$file"
    done)
    [[ -z $processes && -z $files ]] && break
    sleep 0.1
  done
  [[ -z $processes ]] || fail "processes left: ${processes//$'\n'/ }"
  [[ -z $files ]] || fail "files left: $files"
  runs=1
}

case $mode in
  matrix | full | killed) "$mode" ;;
  *) refuse "$mode" ;;
esac
echo "dcp_decode: $mode: $runs runs, $failures failures"
exit $((failures > 0))
