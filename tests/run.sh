#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing, builds, and runs the test suite. The last line is
# "N passed, M failed, K skipped"; the exit status is 0 only when nothing failed.
#
#   bash tests/run.sh               what every change must pass
#   bash tests/run.sh --full        the long matrix, clang-tidy, clang++ on everything; and --sanitize
#   bash tests/run.sh --sanitize    and everything but the long matrix under address, undefined and
#                                   thread sanitizers, in --full as well
#
# The GPU parts are built where CUDA and NCCL are found, and run where a GPU is. Where there is none,
# a program with GPU parts runs on the host, so the short run then has one tree for both, the preset
# gpu: most of its time goes into compiling. COHORT_WERROR=ON makes warnings errors.
set -uo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=cmake/command_line.sh
source cmake/command_line.sh
help_if_asked "$@"

full=0
sanitize=0
for argument in "$@"; do
  case $argument in
    --full) full=1 sanitize=1 ;;
    --sanitize) sanitize=1 ;;
    *) refuse "$argument" ;;
  esac
done

jobs=$(nproc)
passed=0
failed=0
skipped=0
problems=()
reasons=()
export COHORT_TEST_FULL=$full
((full)) || export COHORT_QUICK=ON
# shellcheck source=cmake/mpi_env.sh
source cmake/mpi_env.sh

finish() {
  if ((${#reasons[@]})); then
    echo
    echo "Skipped:"
    printf '  %s\n' "${reasons[@]}" | LC_ALL=C sort | uniq -c | sed 's/^ *\([0-9]*\)  /  \1 x /'
  fi
  if ((${#problems[@]})); then
    echo
    echo "Failed:"
    printf '  %s\n' "${problems[@]}"
  fi
  echo
  echo "$passed passed, $failed failed, $skipped skipped"
  exit $((failed > 0))
}

problem() {
  failed=$((failed + ${2:-1}))
  problems+=("$1")
}

skip() {
  skipped=$((skipped + 1))
  reasons+=("$1")
}

step() { printf '\n== %s\n' "$*"; }

build() {
  step "build $1"
  bash cmake/build.sh "$1" || { problem "build $1"; return 1; }
}

build_gpu() {
  step "build gpu"
  bash cmake/build.sh gpu | tee build/gpu.build.log
  return "${PIPESTATUS[0]}"
}

gpu_is_here() { compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

# ctest's report (JUnit) of one run, added up. A test whose program counted its test cases counts as
# many; any other counts as one. A test that could not start, having not been built, failed.
add_up() {
  local report=$1 preset=$2 kind name count_passed count_failed count_skipped
  while IFS=$'\t' read -r kind name count_passed count_failed count_skipped; do
    case $kind in
      test)
        passed=$((passed + count_passed))
        skipped=$((skipped + count_skipped))
        ((count_failed == 0)) || problem "$preset: $name" "$count_failed"
        ;;
      reason) reasons+=("$preset: $name") ;;
    esac
  done < <(awk '
    function attribute(line, key,    text) {
      text = line
      if (!sub(".* " key "=\"", "", text)) return ""
      sub(/".*/, "", text)
      return text
    }
    function number(line, key,    text) {
      text = line
      if (!sub(".*" key "=", "", text)) return 0
      return text + 0
    }
    /<testcase / {
      name = attribute($0, "name"); status = attribute($0, "status")
      p = f = s = counted = asked = 0
    }
    /cohort-test: passed=/ {
      counted = 1
      p += number($0, "passed"); f += number($0, "failed"); s += number($0, "skipped")
    }
    /<skipped message="SKIP_/ { asked = 1 }
    /cohort-skip: / {
      text = $0
      sub(/.*cohort-skip: /, "", text)
      sub(/<\/system-out>.*/, "", text)
      gsub(/&quot;/, "\"", text); gsub(/&apos;/, "\047", text)
      gsub(/&lt;/, "<", text); gsub(/&gt;/, ">", text); gsub(/&amp;/, "\\&", text)
      print "reason\t" text
    }
    /<\/testcase>/ {
      if (status == "run") { if (!counted) p = 1; else if (f) status = "fail" }
      if (status == "fail") f = f ? f : 1
      if (status == "notrun" || status == "disabled") { if (asked) s = 1; else f = 1 }
      printf "test\t%s\t%d\t%d\t%d\n", name, p, f, s
    }' "$report")
}

# run_tests PRESET CTEST-ARGUMENT...
run_tests() {
  local preset=$1 report="$PWD/build/$1/junit.xml"
  shift
  ((full)) || set -- "$@" -LE full
  step "test $preset"
  rm -f "$report"
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$jobs" \
    --test-output-size-passed 1000000 --test-output-size-failed 1000000 \
    --output-junit "$report" "$@"
  if [[ -s $report ]]; then
    add_up "$report" "$preset"
  else
    problem "ctest $preset"
  fi
}

# run_script NAME OPTION...: tests/NAME.sh, whose last line is like this script's. Status 77: skipped.
run_script() {
  local name=$1 status failures=0 log=build/$1.log
  shift
  step "test $name"
  bash "tests/$name.sh" "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  if ((status == 77)); then
    skip "$(sed -n 's/^cohort-skip: //p' "$log")"
    return
  fi
  if [[ $(tail -n 1 "$log") =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed,\ ([0-9]+)\ skipped$ ]]; then
    passed=$((passed + BASH_REMATCH[1]))
    failures=${BASH_REMATCH[2]}
    skipped=$((skipped + BASH_REMATCH[3]))
    ((failures == 0)) || problem "$name tests" "$failures"
  elif ((status == 0)); then
    problem "tests/$name.sh ended without its counts"
  fi
  ((status == 0 || failures)) || problem "tests/$name.sh ended with status $status"
}

# The short run where no GPU is.
one_tree() {
  local tree=gpu
  export COHORT_HOST_TESTS=ON
  build_gpu
  case $? in
    0)
      passed=$((passed + 1))
      skip "gpu tests: no GPU on this machine"
      # What a machine without CUDA builds, by the README's first command and to look at itself.
      bash cmake/build.sh host dcp_decode cohort_info || problem "build host"
      ;;
    3)
      skip "gpu build and tests: $(tail -n 1 build/gpu.build.log)"
      tree=host
      build host
      ;;
    *) problem "build gpu" ;;
  esac
  # Most tests of ranks wait most of their time.
  [[ -e build/$tree/CTestTestfile.cmake ]] && run_tests "$tree" -j $((2 * jobs))
}

mkdir -p build
step "packages"
bash cmake/deps.sh "$( ((full)) && echo --full || echo --tests)" || { problem "packages"; finish; }

if ((full || sanitize)) || gpu_is_here; then
  build host
  [[ -e build/host/CTestTestfile.cmake ]] && run_tests host
else
  one_tree
  run_script torch  # never installs torch: its wheels are gigabytes
  finish
fi

if ((full)); then
  if command -v clang++ >/dev/null; then
    build clang
    [[ -e build/clang/CTestTestfile.cmake ]] && run_tests clang -L unit
  else
    skip "build by clang++: clang++ is not installed"
  fi
fi

if ((sanitize)); then
  # The long matrix repeats the same code with more shapes: hours under a sanitizer.
  export COHORT_TEST_FULL=0 COHORT_QUICK=ON
  build asan
  [[ -e build/asan/CTestTestfile.cmake ]] && run_tests asan -L 'unit|ranks|fuzz|modules' -LE full
  # Open MPI is not instrumented, so the thread sanitizer judges ranks that are threads.
  build tsan
  [[ -e build/tsan/CTestTestfile.cmake ]] && run_tests tsan -L "unit|fuzz" -LE full
  export COHORT_TEST_FULL=$full
  ((full)) && unset COHORT_QUICK
fi

run_script torch

build_gpu
case $? in
  0)
    passed=$((passed + 1))  # that it compiles is a result, GPU or not
    run_tests gpu -L unit
    if gpu_is_here; then
      run_script gpu $( ((full)) && echo --full)
    else
      skip "gpu tests: no GPU on this machine"
    fi
    ;;
  3) skip "gpu build and tests: $(tail -n 1 build/gpu.build.log)" ;;
  *) problem "build gpu" ;;
esac

finish
