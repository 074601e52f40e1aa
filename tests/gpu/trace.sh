#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: trace.sh GPU_SURVIVOR COHORT_TRACE [HOSTS]
# Has two ranks on cards hang on purpose (traced.hpp), each time in another way, and lets cohort_trace
# say why. HOSTS is as_hosts.sh's mode. Exit status: 0 passed, 1 failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../../cmake/mpi_env.sh"
program=$1 trace=$2 hosts=${3:-one}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0
failures=0

# hang MODE [LIMIT_MS]: leaves traces in a folder of its own.
hang() {
  mkdir "$work/$1"
  COHORT_TRACE_DIR=$work/$1 COHORT_TIMEOUT_MS=${2:-20000} \
    timeout 60 mpirun --enable-recovery -n 2 bash "$here/as_hosts.sh" "$hosts" "$program" "traced-$1" \
    >"$work/$1.output" 2>&1
  timeout 10 "$trace" "$work/$1" >"$work/$1.verdict" 2>&1
}

# judge MODE SENTENCE [SAID]: the first line as a regular expression, and a line of the ranks' output
# that says so while they wait.
judge() {
  local mode=$1 sentence=$2 said=${3:-} problem=""
  head -n 1 "$work/$mode.verdict" | grep -qxE "$sentence" || problem="expected $sentence"
  [[ -z $said ]] || grep -qE "$said" "$work/$mode.output" || problem="nobody said $said"
  if [[ -n $problem ]]; then
    echo "trace: $mode: $problem"
    cat "$work/$mode.output" "$work/$mode.verdict"
    failures=$((failures + 1))
  else
    head -n 1 "$work/$mode.verdict"
    passed=$((passed + 1))
  fi
}

for mode in call replay death difference; do
  hang "$mode"
done
hang growth 6000

since='to which rank 0 came at [0-9:.]* UTC, [0-9.]* m?s before the end'
away='and it is in no call of the state'
at="its last call there is launch #[0-9]+ of graph 1"
judge call \
  "rank 1 is behind in tp\[0\]: it has not come to all_reduce #[0-9]+ of f32\(4096\), $since; $at, $away" \
  'group tp\[0\]: rank 0 has waited in synchronize: rank 1 has not come to all_reduce #[0-9]+; its last call is launch #[0-9]+, for [0-9]+ ms of at most 1500'
judge replay \
  "rank 1 is behind in tp\[0\]: it has not come to launch #[0-9]+ of graph 1, $since, and wait in call 1 of 2 of graph 1, all_reduce of f32\(4096\); $at, $away"
judge growth \
  "rank 1 is behind in tp\[0\]: it has not come to agreement #[0-9]+ on (reservation in arena|growth of the inboxes of) tp\[0\], $since; $at, $away" \
  'group tp\[0\]: rank 0 has waited for rank 1 to come to all_gather #[0-9]+ over the control plane, in agreement #[0-9]+'
judge death \
  "rank 1 is behind in tp\[0\]: it has not come to all_reduce #[0-9]+ of f32\(4096\), $since; $at, and its process is gone"
judge difference \
  "ranks 0 and 1 make different calls in tp\[0\]: rank 0 made all_reduce #[0-9]+ of f32\(4096\) where rank 1 made all_reduce #[0-9]+ of f32\(2048\); what differs: extent 0 of x, 4096 and 2048"
echo "cohort-test: passed=$passed failed=$failures skipped=0"
exit $((failures > 0))
