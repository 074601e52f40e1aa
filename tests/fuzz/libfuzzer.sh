#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the frames fuzzer with libFuzzer and runs it for two minutes:  libfuzzer.sh FOLDER [OPTION...]
# Options go to libFuzzer; what it finds lies in FOLDER as crash-*, and is repeated by giving that
# file as an option.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
folder=$1
shift

skip() {
  echo "cohort-skip: frames by libFuzzer: $1"
  exit 77
}
command -v clang++ >/dev/null || skip "clang++ is not installed"
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
  clang++ -x c++ -fsanitize=fuzzer,address,undefined -o "$folder/libfuzzer_probe" - 2>/dev/null ||
  skip "clang++ has no libFuzzer runtime (package libclang-rt-dev)"

clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
  -I"$root/include" "$here/frames.cpp" "$here/frames_libfuzzer.cpp" -lfmt -lpthread -lrt \
  -o "$folder/fuzz_frames_libfuzzer"
cd "$folder"
(($#)) || set -- -max_total_time=120 -seed=1
exec ./fuzz_frames_libfuzzer -max_len=400 -timeout=20 -rss_limit_mb=2048 "$@"
