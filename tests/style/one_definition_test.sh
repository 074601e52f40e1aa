#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The check for names that are defined twice must find what it is there to find, and nothing else.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree/include/cohort/mpi"

# expect STATUS ONE OTHER: two headers, with this text in namespace cohort::detail of each.
expect() {
  local status=$1 got=0
  printf '#pragma once\nnamespace cohort {\n\nnamespace detail {\n\n%s\n\n}  // namespace detail\n\n}  // namespace cohort\n' \
    "$2" >"$tree/include/cohort/one.hpp"
  printf '#pragma once\nnamespace cohort::detail {\n\n%s\n\n}  // namespace cohort::detail\n' \
    "$3" >"$tree/include/cohort/mpi/other.hpp"
  bash "$here/one_definition.sh" "$tree" 1 >"$tree/output" || got=$?
  if [[ $got != "$status" ]]; then
    echo "FAILED: status $got, expected $status, of: $2 / $3"
    cat "$tree/output"
    exit 1
  fi
}

class=$'class Pause {\n public:\n  void rest() {\n    int rounds = 0;\n  }\n};'
expect 1 "$class" "$class"
expect 1 "$class" $'struct alignas(64) Pause final : Base {\n};'
expect 1 $'template <class T>\nclass Pause {\n};' "$class"
expect 0 "$class" "class Pause;"
expect 0 "$class" $'class Paused {\n  void rest() {\n    int rounds = 0;\n  }\n};'
expect 1 $'enum class Way {\n  left,\n};' $'enum class Way {\n  right,\n};'
expect 1 $'[[nodiscard]] inline int rest(int rounds) {\n  return rounds;\n}' $'inline int rest(int n) noexcept {\n  return n;\n}'
expect 1 $'inline void rest(const std::string& name,\n                 int rounds = 3) {\n}' $'inline void rest(const std::string& text, int n) {\n}'
expect 0 $'inline void rest(int rounds) {\n}' $'inline void rest(double rounds) {\n}'
expect 0 $'inline void rest(int rounds) {\n}' "void rest(int rounds);"
expect 1 "inline constexpr int kRounds = 3;" "inline constexpr std::int64_t kRounds = 4;"
expect 1 "using Clock = std::chrono::steady_clock;" "using Clock = std::chrono::system_clock;"
# outside TEXT: TEXT in namespace cohort, between two parts of cohort::detail.
outside() {
  printf '}  // namespace cohort::detail\n\nnamespace cohort {\n\n%s\n\n}  // namespace cohort\n\nnamespace cohort::detail {' "$1"
}
expect 1 "$class" "$(outside $'struct Pause {\n};')"
expect 1 "using Pause = int;" "$(outside $'struct Pause {\n};')"
expect 0 "$class" "$(outside $'struct Pauses {\n};')"
expect 0 $'inline void rest(int rounds) {\n}' "$(outside $'inline void rest(int rounds) {\n}')"
echo "one definition: the check finds every kind of double definition"
