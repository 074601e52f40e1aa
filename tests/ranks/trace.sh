#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: trace.sh PROGRAM COHORT_TRACE
# Has three ranks hang on purpose (support/trace_checks.hpp), each time in another way, and lets
# cohort_trace say why. Exit status: 0 passed, 1 failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../../cmake/mpi_env.sh"
program=$1 trace=$2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
limit=30  # seconds for the ranks of one mode
fail() {
  echo "trace: $*"
  cat "$work/output" "$work/verdict"
  failures=$((failures + 1))
}

# judge MODE SENTENCE [SAID]: the whole first line as a regular expression, and a line of the ranks'
# output that says so while they wait.
judge() {
  local mode=$1 sentence=$2 said=${3:-} status=0
  rm -rf "$work/traces" && mkdir "$work/traces"
  COHORT_TEST_NOT_ADDED_UP=1 COHORT_TRACE_DIR=$work/traces COHORT_TIMEOUT_MS=1000 \
    timeout "$limit" mpirun --enable-recovery -n 3 "$program" "[.traced_$mode]" >"$work/output" 2>&1
  timeout 10 "$trace" --svg "$work/picture.svg" "$work/traces" >"$work/verdict" 2>&1 || status=$?
  ((status == 0)) || fail "$mode: cohort_trace ended with status $status"
  head -n 1 "$work/verdict" | grep -qxE "$sentence" || fail "$mode: expected $sentence"
  grep -q '<rect' "$work/picture.svg" || fail "$mode: no picture"
  [[ -z $said ]] || grep -qE "$said" "$work/output" || fail "$mode: nobody said $said"
  head -n 1 "$work/verdict"
}

since='to which ranks 0 and 1 came at [0-9:.]* UTC, [0-9.]* m?s before the end'
away='and it is in no call of the state'
judge call \
  "rank 2 is behind in tp\[0\]: it has not come to all_reduce #4 of f32\(16,33\), $since; its last call there is all_reduce #3 of f32\(16,33\), $away" \
  'group tp\[0\]: rank 0 has waited for rank 2 to come to all_reduce, step [0-9]+, for [0-9]+ ms of at most [0-9]+'
judge replay \
  "rank 2 is behind in tp\[0\]: it has not come to launch #6 of graph 1, $since, and wait in call 1 of 2 of graph 1, all_reduce of f32\(16,33\); its last call there is launch #5 of graph 1, $away"
judge growth \
  "rank 2 is behind in tp\[0\]: it has not come to agreement #4 on reservation in arena tp\[0\], $since; its last call there is all_reduce #3 of f32\(16,33\), $away" \
  'group tp\[0\]: rank 0 has waited for rank 2 to come to all_gather #[0-9]+ over the control plane, in agreement #4, reservation in arena tp\[0\], for [0-9]+ ms of at most [0-9]+'
limit=10  # mpirun may go on for ever where a rank was killed; the others are long done
judge death \
  "rank 2 is behind in tp\[0\]: it has not come to all_reduce #4 of f32\(16,33\), $since; its last call there is all_reduce #3 of f32\(16,33\), and its process is gone"
limit=30
judge pair \
  "rank 2 is behind in tp\[0\]: rank 0 has waited for it in recv of f32\(16,33\) from it for [0-9.]* m?s; as it wrote no trace itself, nothing else is known of it"
judge formation \
  "rank 2 is behind in the formation of the state: it has not come to agreement #1 on creation of a ParallelState: .*, $since; its last call there is none, $away"
judge shutdown \
  "rank 2 is behind in world: it has not come to agreement #1 on shutdown of the state, $since; its last call there is none, $away"
judge difference \
  "rank 2 differs in tp\[0\]: it made all_reduce #4 of f32\(8,33\) where the others made all_reduce #4 of f32\(16,33\); what differs: extent 0 of x, 8 and 16"
exit $((failures > 0))
