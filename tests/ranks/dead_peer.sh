#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: dead_peer.sh recovery|plain PROGRAM RANKS MODE [VICTIM [LIMIT_MS]]
# Runs PROGRAM (dead_peer_test.cpp), in which the rank VICTIM is killed, and judges what is left.
#   recovery  mpirun does not end the job when a rank dies: each survivor must print its own
#             TimeoutError that names the victim, within the limit, and leave by itself
#   plain     mpirun as engines start it: the job must fail within 30 s
# Either way no process and no file of the job may be left.
# Exit status: 0 passed, 1 failed, 77 skipped with a reason.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../../cmake/mpi_env.sh"

how=$1 program=$2 ranks=$3 mode=$4 victim=${5:-1} limit=${6:-2000}

if ! mpirun --version 2>/dev/null | grep -q 'Open MPI) 4'; then
  echo "cohort-skip: dead_peer: --enable-recovery is Open MPI 4's"
  exit 77
fi

# Every process of the job carries a mark, and has a place of its own for temporary files.
export COHORT_DEAD_PEER_MARK=$$-$RANDOM-$RANDOM
work=$(mktemp -d)
output=$work/output
export TMPDIR=$work/tmp
mkdir "$TMPDIR"
# The job's place must not be inside a place with a long name: Open MPI puts sockets there.
trap 'rm -rf "$work"' EXIT

failures=0
fail() {
  echo "dead_peer: $*"
  failures=$((failures + 1))
}

# Of the processes with the mark, those that run the program or mpirun, not this script's helpers.
marked_processes() {
  local environ exe
  for environ in $(grep -lsz "^COHORT_DEAD_PEER_MARK=$COHORT_DEAD_PEER_MARK\$" /proc/[0-9]*/environ); do
    exe=$(readlink "${environ%/environ}/exe") || continue
    case ${exe##*/} in
      mpirun | orterun | orted | "${program##*/}") echo "${environ//[!0-9]/}" ;;
    esac
  done
}

# Files of shared memory that no living process has open.
orphaned_files() {
  local file
  for file in $(find /dev/shm -type f -newer "$work/start" 2>/dev/null) \
    $(find /tmp -maxdepth 1 -name '*cohort*' -newer "$work/start" 2>/dev/null); do
    if ! grep -qsF "$file" /proc/[0-9]*/maps && ! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qF "$file"; then
      echo "$file"
    fi
  done
}

touch "$work/start"
sleep 0.02 # file systems keep time in ticks
recovery=()
[[ $how == recovery ]] && recovery=(--enable-recovery)
started=$(date +%s%N)
timeout --kill-after=5 45 mpirun "${recovery[@]}" -n "$ranks" "$program" "$mode" "$victim" "$limit" \
  >"$output" 2>&1
status=$?
elapsed=$((($(date +%s%N) - started) / 1000000))
cat "$output"
echo "dead_peer: mpirun ended with $status after $elapsed ms"

((elapsed < 30000)) || fail "the job took $elapsed ms to end, expected at most 30000"
# With --enable-recovery mpirun's own status is 0 whatever the ranks did.
[[ $how == recovery ]] || ((status != 0)) || fail "a job that lost a rank must not succeed"

if [[ $how == recovery ]]; then
  # Both ends of the wait: not before the limit, but for the moment that one rank entered after
  # another, which tells it when it gives up; and with little delay after it.
  early=250
  slack=2000
  for ((rank = 0; rank < ranks; ++rank)); do
    ((rank == victim)) && continue
    if [[ $mode == end_of_session ]]; then
      line=$(grep -o "survivor $rank: logs: .*end of the MPI session.*rank $victim did not arrive.*" "$output")
      [[ -n $line ]] || fail "rank $rank does not log at its end that rank $victim is missing"
    else
      line=$(grep -o "survivor $rank: TimeoutError after [0-9]* ms, missing $victim: .*rank $victim .*" "$output")
      if [[ -z $line ]]; then
        fail "rank $rank does not report a TimeoutError that names rank $victim alone"
        continue
      fi
      waited=${line#*after }
      waited=${waited%% ms*}
      ((waited >= limit - early && waited <= limit + slack)) ||
        fail "rank $rank waited $waited ms, expected $((limit - early)) to $((limit + slack))"
    fi
    grep -q "survivor $rank: leaves" "$output" || fail "rank $rank did not leave by itself"
  done
  ! grep -q "survivor $victim:" "$output" || fail "rank $victim was not killed"
fi

for _ in $(seq 50); do
  processes=$(marked_processes)
  files=$(orphaned_files)
  temporary=$(find "$TMPDIR" -mindepth 1)
  [[ -z $processes && -z $files && -z $temporary ]] && break
  sleep 0.1
done
[[ -z $processes ]] || fail "processes left: ${processes//$'\n'/ }"
[[ -z $files ]] || fail "files left: $files"
[[ -z $temporary ]] || fail "temporary files left: $temporary"

((failures == 0)) && echo "dead_peer: $how $mode with $ranks ranks passed"
exit $((failures > 0))
