#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests that need a GPU, with what this machine has, and says what it leaves out. The
# programs are those of the preset gpu. The last line is "N passed, M failed, K skipped".
#
#   bash tests/gpu.sh            what every change must pass
#   bash tests/gpu.sh --full     long soaks, and memcheck over everything
#
# COHORT_GPU_BIN is the folder of the programs (default build/gpu/bin), COHORT_GPU_LIMIT the seconds
# that one program may take (default 240).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

full=0
[[ ${1:-} == --full ]] && full=1
export COHORT_TEST_FULL=$full
bin=${COHORT_GPU_BIN:-build/gpu/bin}
limit=${COHORT_GPU_LIMIT:-240}
passed=0
failed=0
skipped=0
# shellcheck source=cmake/mpi_env.sh
source cmake/mpi_env.sh
# Never multicast, whatever the library under test does: it can take a host's GPUs out of service.
# It is also the proof that a value which is already set wins.
export NCCL_NVLS_ENABLE=0

finish() {
  echo "$passed passed, $failed failed, $skipped skipped"
  exit $((failed > 0))
}

skip() {
  skipped=$((skipped + 1))
  echo "-- skipped: $*"
}

# run NAME COMMAND...: adds up the counts that the program prints; one that prints none counts as
# one. Whoever outlasts the limit failed.
run() {
  local name=$1 output status counts begin=$SECONDS
  shift
  echo "== $name"
  output=$(timeout --kill-after=15 "$limit" "$@" 2>&1)
  status=$?
  grep -E '^(\[[0-9,]*\]<std(out|err)>: ?)?cohort-skip: ' <<<"$output" | sort -u
  counts=$(grep -oE 'cohort-test: passed=[0-9]+ failed=[0-9]+ skipped=[0-9]+' <<<"$output" | tail -n 1)
  if [[ $counts =~ passed=([0-9]+)\ failed=([0-9]+)\ skipped=([0-9]+) ]]; then
    passed=$((passed + BASH_REMATCH[1]))
    failed=$((failed + BASH_REMATCH[2]))
    skipped=$((skipped + BASH_REMATCH[3]))
    ((status != 0 && BASH_REMATCH[2] == 0)) && failed=$((failed + 1))
  elif ((status == 0)); then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
  if ((status != 0)); then
    tail -n 60 <<<"$output"
    echo "-- $name ended with status $status"
  fi
  echo "-- ${counts:-no counts} in $((SECONDS - begin)) s"
}

# ranks NAME N MODE PROGRAM ARGUMENT...: NAME=VALUE words before PROGRAM are set for the ranks.
ranks() {
  local name=$1 n=$2 mode=$3
  shift 3
  run "$name, $n ranks, hosts: $mode" \
    mpirun -n "$n" --timeout "$limit" bash tests/gpu/as_hosts.sh "$mode" env "$@"
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
echo "GPUs: $gpus"
nvidia-smi -L 2>/dev/null
if ((gpus == 0)); then
  skip "everything: no GPU"
  finish
fi
if [[ ! -x $bin/gpu_cuda_stream ]]; then
  echo "-- no programs in $bin: bash cmake/build.sh gpu"
  failed=1
  finish
fi

# --- one card, one process -----------------------------------------------------------------------

run "a card without code" "$bin/gpu_no_code"
run "streams, captures and memory" "$bin/gpu_cuda_stream"
if [[ -x $bin/gpu_own_kernels ]]; then
  run "own kernels" "$bin/gpu_own_kernels" --soak "$( ((full)) && echo 100000 || echo 3000)"
else
  skip "own kernels: no gpu_own_kernels"
fi

if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  # Waits in kernels are far slower under it, hence the small sizes.
  memcheck=("$sanitizer" --tool memcheck --error-exitcode 9 --report-api-errors no)
  run "memcheck: streams, captures and memory" "${memcheck[@]}" "$bin/gpu_cuda_stream"
  if [[ -x $bin/gpu_own_kernels ]]; then
    run "memcheck: own kernels" "${memcheck[@]}" "$bin/gpu_own_kernels" --ranks 2 --soak 20
  fi
else
  skip "memcheck: no compute-sanitizer"
fi

# --- one card, several ranks ----------------------------------------------------------------------

if ! command -v mpirun >/dev/null || [[ ! -x $bin/gpu_nccl_transport ]]; then
  skip "everything with ranks: no mpirun, or no gpu_nccl_transport"
  finish
fi

transport=$bin/gpu_nccl_transport
ranks "transport" 1 one "$transport"
for n in 2 4 8; do
  # Over sockets, several ranks a card; one card is visible, so that is the case on any machine.
  ranks "transport, one card" "$n" rank CUDA_VISIBLE_DEVICES=0 "$transport"
  ranks "transport, one card, NCCL for all sizes" "$n" rank \
    CUDA_VISIBLE_DEVICES=0 COHORT_OWN_MAX_BYTES=0 "$transport"
done
ranks "a value that is set wins" 2 rank CUDA_VISIBLE_DEVICES=0 CUDA_DEVICE_MAX_CONNECTIONS=4 \
  COHORT_TEST_CONNECTIONS=4 "$transport" "the environment*"
if ((full)) && [[ -n ${sanitizer:-} ]]; then
  ranks "memcheck: transport" 2 rank CUDA_VISIBLE_DEVICES=0 "${memcheck[@]}" "$transport" \
    "all_gather*,reduce_scatter*,all_reduce*"
fi

# The example on the device: every plan, both bases, symmetric on and off, eager and captured.
decode=$bin/dcp_decode
if [[ -x $decode ]]; then
  small=(--backend cuda --batch 4 --heads 16 --steps 6 --context 64)
  for plan in staged packed one_kernel; do
    for base in e 2; do
      for symmetric in on off; do
        for graph in "" --graph; do
          # shellcheck disable=SC2086  # no word where there is no graph
          ranks "dcp_decode $plan base $base symmetric $symmetric $graph" 4 rank \
            CUDA_VISIBLE_DEVICES=0 "$decode" "${small[@]}" --tp 4 --dcp 4 --merge "$plan" \
            --lse-base "$base" --symmetric "$symmetric" $graph
        done
      done
    done
  done
  for n in 2 8; do
    ranks "dcp_decode automatic" "$n" rank CUDA_VISIBLE_DEVICES=0 "$decode" "${small[@]}" \
      --tp "$n" --dcp "$n"
  done
else
  skip "dcp_decode on the device: no dcp_decode"
fi

# --- two cards and more -----------------------------------------------------------------------------

if ((gpus < 2)); then
  skip "windows, the symmetric path and peers on other cards: one GPU"
  skip "two hosts of two cards: one GPU"
  skip "the visibility guard: one GPU"
  finish
fi

# Flag lines over the link, whose stores must arrive whole: 100,000 calls in the long run.
if [[ -x $bin/gpu_own_kernels ]]; then
  for n in 2 4; do
    run "own kernels of several groups at once, $n ranks on 2 cards" "$bin/gpu_own_kernels" \
      --only overlap --ranks "$n" --cards 2 --rounds "$( ((full)) && echo 10000 || echo 1000)"
    run "own kernels, $n ranks on 2 cards" "$bin/gpu_own_kernels" --only soak --ranks "$n" --cards 2 \
      --soak "$( ((full)) && echo 100000 || echo 10000)"
  done
fi
cards=$((gpus < 8 ? gpus : 8))
for ((n = 2; n <= cards; n *= 2)); do
  ranks "transport, a card a rank" "$n" one "$transport"
  ranks "transport, a card a rank, NCCL for all sizes" "$n" one COHORT_OWN_MAX_BYTES=0 "$transport"
done
for ((n = 2; n <= cards; n *= 2)); do
  ranks "late, stopped and absent ranks" "$n" one "$bin/gpu_liveness"
done
if [[ -x $bin/gpu_survivor ]]; then
  for way in own nccl; do
    # mpirun's own status is that of the rank that was killed, so the counts decide.
    run "a rank killed among calls: $way" bash -c \
      'mpirun -n 2 --enable-recovery --timeout 100 "$@" 2>&1 | grep -a "^survivor\|^cohort-test" |
       tee /dev/stderr | grep -q "^cohort-test: passed=[1-9][0-9]* failed=0"' _ \
      "$bin/gpu_survivor" "$way"
  done
fi
# Each process sees its own card alone.
run "transport, one visible card a process" mpirun -n 2 --timeout "$limit" bash -c \
  'export CUDA_VISIBLE_DEVICES=${OMPI_COMM_WORLD_LOCAL_RANK:-0}; exec "$@"' one_card "$transport"
# Four ranks as two hosts of two cards: tp=4 over sockets, dcp=2 in windows.
ranks "two hosts of two cards" 4 pair CUDA_VISIBLE_DEVICES=0,1 "$transport"
if [[ -x $decode ]]; then
  for graph in "" --graph; do
    for plan in staged packed one_kernel; do
      # shellcheck disable=SC2086
      ranks "dcp_decode $plan $graph, a card a rank" 2 one "$decode" "${small[@]}" --tp 2 --dcp 2 \
        --merge "$plan" --symmetric on $graph
    done
    # shellcheck disable=SC2086
    ranks "dcp_decode on two hosts of two cards $graph" 4 pair CUDA_VISIBLE_DEVICES=0,1 "$decode" \
      "${small[@]}" --tp 4 --dcp 2 --symmetric on $graph
  done
fi
ranks "visibility guard" 2 one "$bin/gpu_visibility_guard"

finish
