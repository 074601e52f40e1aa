# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts here: attempt NAME COMMAND... counts the command as passed, or as failed with
# its output, and the others go on. The output is kept in the folder $work meanwhile.

passed=0
failed=0
attempt() {
  local name=$1
  shift
  if "$@" >"$work/log" 2>&1; then
    passed=$((passed + 1))
  else
    echo "FAILED: $name"
    cat "$work/log"
    failed=$((failed + 1))
  fi
}
