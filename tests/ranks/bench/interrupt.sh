#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: interrupt.sh COHORT_BENCH MPIEXEC
# An interrupted run ends on all ranks, in order, and keeps the rows that it had. One rank gets the
# signal: the others learn of it in the next round.
set -euo pipefail
program=$1 mpiexec=$2
# shellcheck source=tests/ranks/bench/scratch.sh
source "$(dirname "$0")/scratch.sh"

# The last rank writes its process number and becomes the program.
cat >"$folder/rank.sh" <<'RANK'
#!/usr/bin/env bash
[[ ${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}} != 1 ]] || echo $$ >"$1/pid"
shift
exec "$@"
RANK
chmod +x "$folder/rank.sh"

status=0
timeout 120 "$mpiexec" -n 2 "$folder/rank.sh" "$folder" "$program" --bench all_gather \
  --iters 1000000 --max-seconds 2 --min-bytes 2K --max-bytes 16M --modes eager \
  --json "$folder/rows.json" >"$folder/output" 2>&1 &
job=$!
for _ in $(seq 600); do
  grep -qs '"bench"' "$folder/rows.json" && break
  sleep 0.1
done
grep -qs '"bench"' "$folder/rows.json" || fail "no rows"
[[ -s $folder/pid ]] || { echo "cohort-skip: interrupt: the launcher does not number its ranks"; exit 77; }
kill -INT "$(cat "$folder/pid")"
wait "$job" || status=$?
grep -q '^interrupted; [0-9]* rows kept' "$folder/output" || fail "status $status, and no word of the interruption"
[[ $status == 130 ]] || fail "status $status instead of 130"
[[ $(head -c 8 "$folder/rows.json") == '{"meta":' ]] || fail "the result file is damaged"
[[ $(tail -c 2 "$folder/rows.json") == '}' ]] || fail "the result file ends in half a row"
echo "interrupt: all ranks ended, $(($(wc -l <"$folder/rows.json") - 1)) rows kept"
