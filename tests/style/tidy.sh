#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# clang-tidy over every public header (through the file that includes it alone), the examples and the
# tests' support code, with the checks of .clang-tidy.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v clang-tidy >/dev/null; then
  echo "cohort-skip: style.tidy: clang-tidy is not installed"
  exit 77
fi
# Precompiled headers of g++ mean nothing to clang-tidy, so it gets a configuration of its own.
cmake --preset host -B build/tidy -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON >build/tidy.log 2>&1 ||
  { cat build/tidy.log; exit 1; }
sed -n 's/^ *"file": "\(.*\)",*$/\1/p' build/tidy/compile_commands.json |
  grep -E '/tests/style/|/examples/|/bench/|/src/' | LC_ALL=C sort -u |
  xargs -P "$(nproc)" -n 4 clang-tidy -p build/tidy --quiet --warnings-as-errors='*'
