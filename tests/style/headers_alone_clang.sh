#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every public header compiles alone with clang++ too, as C++20 and C++23; not torch.hpp, which takes
# Torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v clang++ >/dev/null; then
  echo "cohort-skip: style.headers_alone_clang: clang++ is not installed"
  exit 77
fi
flags=(-fsyntax-only -x c++ -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror
  -Wno-pragma-once-outside-header -Iinclude)
skip='include/cohort/\(cuda\|nccl\|mpi\)\(/\|\.hpp\)'
if command -v mpicxx >/dev/null; then
  skip='include/cohort/\(cuda\|nccl\)\(/\|\.hpp\)'
  for folder in $(mpicxx --showme:incdirs 2>/dev/null); do
    flags+=(-isystem "$folder")
  done
  flags+=(-DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX)
fi
failed=0
while read -r header; do
  for standard in c++20 c++2b; do
    clang++ "-std=$standard" "${flags[@]}" "$header" || { echo "FAILED: $header as $standard"; failed=1; }
  done
done < <(find include -name '*.hpp' | grep -v -e "$skip" -e include/cohort/torch.hpp | LC_ALL=C sort)
exit $failed
