#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cohort_info on one and several ranks: the page, the JSON, the exit status, and wrong options.
#
#   cohort_info.sh PROGRAM MPIRUN
set -uo pipefail
program=$1
mpirun=$2
output=$(mktemp)
trap 'rm -f "$output"' EXIT

fail() {
  echo "cohort_info.sh: $1"
  cat "$output"
  exit 1
}

# expect STATUS RANKS ARGUMENT...
expect() {
  local wanted=$1 ranks=$2 status
  shift 2
  timeout 60 "$mpirun" -n "$ranks" "$program" "$@" >"$output" 2>&1
  status=$?
  [[ $status == "$wanted" ]] || fail "$ranks ranks, $*: status $status, expected $wanted"
}
holds() { grep -qF -- "$1" "$output" || fail "no '$1'"; }

for ranks in 1 2 4; do
  expect 0 "$ranks" --backend host
  holds "host backend, $ranks rank"
  holds "All that was asked for works."
done
holds "tp[0]    ranks 0-3        windows on; peer mapping on"
holds "dcp[0]"

expect 0 4 --backend host --tp 2 --pp 2 --dcp 1 --no-windows --no-self-test
holds "windows off (disabled by user)"

expect 0 2 --backend host --json
python3 - "$output" <<'PYTHON' || fail "the JSON is not as expected"
import json, sys
report = json.load(open(sys.argv[1]))
assert report["well"] and report["ranks"] == 2, report
assert len(report["self_test"]) == 10, report["self_test"]
assert all(not check["error"] for check in report["self_test"])
PYTHON

expect 1 2 --backend host --tp 3
holds "tp"
expect 2 1 --backend nothing
holds "--backend"
expect 2 2 --bakend host
holds "did you mean --backend?"

# What cannot be written is said.
timeout 60 "$mpirun" -n 1 bash -c 'exec "$0" --backend host --no-self-test >/dev/full' "$program" \
  >"$output" 2>&1
status=$?
[[ $status == 1 ]] || fail "to a full device: status $status, expected 1"
holds "cohort_info: the output cannot be written: No space left on device"
