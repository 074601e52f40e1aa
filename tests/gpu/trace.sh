#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: trace.sh GPU_SURVIVOR COHORT_TRACE [HOSTS]
# Has two ranks on cards hang on purpose (traced.hpp), each time in another way, and lets cohort_trace
# say why. HOSTS is as_hosts.sh's mode; `rank` is for two ranks that share a card. Exit status: 0
# passed, 1 failed.
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

# judge MODE WROTE SENTENCE [SAID]: the ranks that left traces of their own, the first line as a
# regular expression, and a line of the ranks' output that says so while they wait.
judge() {
  local mode=$1 wrote=$2 sentence=$3 said=${4:-} problem="" rank
  head -n 1 "$work/$mode.verdict" | grep -qxE "$sentence" || problem="expected $sentence"
  for rank in $wrote; do
    compgen -G "$work/$mode/cohort.rank$rank.*.json" >/dev/null || problem="rank $rank left no trace"
  done
  [[ -z $said ]] || grep -qE "$said" "$work/$mode.output" || problem="nobody said $said"
  if [[ -n $problem ]]; then
    echo "trace: $mode: $problem"
    cat "$work/$mode.output" "$work/$mode.verdict"
    failures=$((failures + 1))
  else
    echo "$mode: $(head -n 1 "$work/$mode.verdict")"
    passed=$((passed + 1))
  fi
}

for mode in call replay death difference busy bare_busy; do
  hang "$mode"
done
for mode in growth bare_growth; do
  hang "$mode" 6000
done

since='to which rank 0 came at [0-9:.]* UTC, [0-9.]* m?s before the end'
away='and it is in no call of the state'
at="its last call there is launch #[0-9]+ of graph 1"
judge call "0 1" \
  "rank 1 is behind in tp\[0\]: it has not come to all_reduce #[0-9]+ of f32\(4096\), $since; $at, $away" \
  'group tp\[0\]: rank 0 has waited in synchronize: rank 1 has not come to all_reduce #[0-9]+; its last call is launch #[0-9]+, for [0-9]+ ms of at most 1500'
judge replay "0 1" \
  "rank 1 is behind in tp\[0\]: it has not come to launch #[0-9]+ of graph 1, $since, and wait in call 1 of 2 of graph 1, all_reduce of f32\(4096\); $at, $away"
for mode in growth bare_growth; do
  judge "$mode" "0 1" \
    "rank 1 is behind in tp\[0\]: it has not come to agreement #[0-9]+ on (reservation in arena|growth of the inboxes of) tp\[0\], $since; $at, $away" \
    'group tp\[0\]: rank 0 has waited for rank 1 to come to all_gather #[0-9]+ over the control plane, in agreement #[0-9]+'
done
judge death 0 \
  "rank 1 is behind in tp\[0\]: it has not come to all_reduce #[0-9]+ of f32\(4096\), $since; $at, and its process is gone"
judge difference "0 1" \
  "ranks 0 and 1 make different calls in tp\[0\]: rank 0 made all_reduce #[0-9]+ of f32\(4096\) where rank 1 made all_reduce #[0-9]+ of f32\(2048\); what differs: extent 0 of x, 4096 and 2048"
nothing='no rank is behind another, and no calls differ, as far as is known'
judge busy "0 1" "$nothing"
judge bare_busy "0 1" \
  "$nothing; ranks 0 and 1 have all begun call 2 of 2 of graph 1, all_gather of f32\(4096\) of tp\[0\], [0-9.]* m?s before the end, and its end is not recorded"
echo "cohort-test: passed=$passed failed=$failures skipped=0"
exit $((failures > 0))
