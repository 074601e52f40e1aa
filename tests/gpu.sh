#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests that need a GPU, with what this machine has, and says what it leaves out. The
# programs are those of the preset gpu. The last line is "N passed, M failed, K skipped".
#
#   bash tests/gpu.sh            what every change must pass
#   bash tests/gpu.sh --full     long soaks, and memcheck over everything
#   bash tests/gpu.sh PART...    of those below: one, share, cards, faults
#
# COHORT_GPU_BIN is the folder of the programs (default build/gpu/bin), COHORT_GPU_LIMIT the seconds
# that one program may take (default 240).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=cmake/command_line.sh
source cmake/command_line.sh
help_if_asked "$@"

full=0
parts=()
for argument in "$@"; do
  case $argument in
    --full) full=1 ;;
    one | share | cards | faults) parts+=("$argument") ;;
    *) refuse "$argument" ;;
  esac
done
((${#parts[@]})) || parts=(one share cards faults)
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

# report NAME COMMAND...: runs the command and says how it went. The last line is what it adds to
# the sums: the counts that the program prints, one where it prints none. Whoever outlasts the limit
# failed.
report() {
  local name=$1 output status counts begin=$SECONDS p=0 f=0 k=0
  shift
  echo "== $name"
  output=$(timeout --kill-after=15 "$limit" "$@" 2>&1)
  status=$?
  grep -E '^(\[[0-9,]*\]<std(out|err)>: ?)?cohort-skip: ' <<<"$output" | sort -u
  counts=$(grep -oE 'cohort-test: passed=[0-9]+ failed=[0-9]+ skipped=[0-9]+' <<<"$output" | tail -n 1)
  if [[ $counts =~ passed=([0-9]+)\ failed=([0-9]+)\ skipped=([0-9]+) ]]; then
    p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]} k=${BASH_REMATCH[3]}
    ((status != 0 && f == 0)) && f=1
  elif ((status == 0)); then
    p=1
  else
    f=1
  fi
  if ((status != 0)); then
    tail -n 60 <<<"$output"
    echo "-- $name ended with status $status"
  fi
  echo "-- ${counts:-no counts} in $((SECONDS - begin)) s"
  echo "$p $f $k"
}

# add_up: prints the report that it reads, but its last line, which it adds to the sums.
add_up() {
  local lines p f k
  mapfile -t lines
  printf '%s\n' "${lines[@]:0:${#lines[@]}-1}"
  read -r p f k <<<"${lines[-1]}"
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + k))
}

# run NAME COMMAND...: a case that has the machine to itself.
run() { add_up < <(report "$@"); }

# Cases that judge no times go side by side, `beside` of them for each card, which they have to
# themselves unless they say otherwise: most of their time is the start of processes.
# `later NAME COMMAND...` takes note of one, `run_later` runs them all.
beside=2
noted=()
later() { noted+=("$(printf '%q ' "$@")"); }
run_later() {
  local folder workers=$((gpus * beside)) w i
  folder=$(mktemp -d)
  for ((w = 0; w < workers; w++)); do
    (
      export CUDA_VISIBLE_DEVICES=$((w % gpus))
      for ((i = w; i < ${#noted[@]}; i += workers)); do
        eval "report ${noted[i]}" >"$folder/$i"
      done
    ) &
  done
  wait
  for ((i = 0; i < ${#noted[@]}; i++)); do
    add_up <"$folder/$i"
  done
  rm -r "$folder"
  noted=()
}

# ranks NAME N MODE PROGRAM ARGUMENT...: NAME=VALUE words before PROGRAM are set for the ranks.
ranks() { with_ranks run "$@"; }
ranks_later() { with_ranks later "$@"; }
with_ranks() {
  local how=$1 name=$2 n=$3 mode=$4
  shift 4
  "$how" "$name, $n ranks, hosts: $mode" \
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

own=$bin/gpu_own_kernels
transport=$bin/gpu_nccl_transport
decode=$bin/dcp_decode
small=(--backend cuda --batch 4 --heads 16 --steps 6 --context 64)
# Waits in kernels are far slower under it, hence the small sizes.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
memcheck=("$sanitizer" --tool memcheck --error-exitcode 9 --report-api-errors no)

# One card, one process.
part_one() {
  run "a card without code" "$bin/gpu_no_code"
  run "streams, captures and memory" "$bin/gpu_cuda_stream"
  run "own kernels" "$own" --soak "$( ((full)) && echo 100000 || echo 3000)"
  if [[ -z $sanitizer ]]; then
    skip "memcheck: no compute-sanitizer"
    return
  fi
  run "memcheck: streams, captures and memory" "${memcheck[@]}" "$bin/gpu_cuda_stream"
  run "memcheck: own kernels" "${memcheck[@]}" "$own" --ranks 2 --soak 20
}

# Several ranks that share a card, over sockets. The largest come first.
part_share() {
  local n plan base symmetric graph
  for n in 8 4 2; do
    ranks_later "transport, one card" "$n" rank "$transport"
    ((full || n < 8)) &&
      ranks_later "transport, one card, NCCL for all sizes" "$n" rank COHORT_OWN_MAX_BYTES=0 "$transport"
  done
  ranks_later "transport" 1 one "$transport"
  ranks_later "a value that is set wins" 2 rank CUDA_DEVICE_MAX_CONNECTIONS=4 \
    COHORT_TEST_CONNECTIONS=4 "$transport" "the environment*"
  # The example on the device: every plan, both bases, symmetric on and off, eager and captured.
  for plan in staged packed one_kernel; do
    for base in e 2; do
      for symmetric in on off; do
        for graph in "" --graph; do
          # shellcheck disable=SC2086  # no word where there is no graph
          ranks_later "dcp_decode $plan base $base symmetric $symmetric $graph" 4 rank \
            "$decode" "${small[@]}" --tp 4 --dcp 4 --merge "$plan" --lse-base "$base" \
            --symmetric "$symmetric" $graph
        done
      done
    done
  done
  for n in 2 8; do
    ranks_later "dcp_decode automatic" "$n" rank "$decode" "${small[@]}" --tp "$n" --dcp "$n"
  done
  run_later
  if ((full)) && [[ -n $sanitizer ]]; then
    ranks "memcheck: transport" 2 rank CUDA_VISIBLE_DEVICES=0 "${memcheck[@]}" "$transport" \
      "all_gather*,reduce_scatter*,all_reduce*"
  fi
}

# A rank on each card, and two hosts of two cards.
part_cards() {
  local n graph plan
  if ((gpus < 2)); then
    skip "windows, the symmetric path, the visibility guard and two hosts of two cards: one GPU"
    return
  fi
  # Flag lines over the link, whose stores must arrive whole: 100,000 calls in the long run.
  run "own kernels of several groups at once" "$own" --only overlap --cards 2 --ranks 2 \
    --rounds "$( ((full)) && echo 10000 || echo 1000)"
  for n in 2 4; do
    run "own kernels, $n ranks on 2 cards" "$own" --only soak --ranks "$n" --cards 2 \
      --soak "$( ((full)) && echo 100000 || echo 10000)"
  done
  for ((n = 2; n <= cards; n *= 2)); do
    ranks "transport, a card a rank" "$n" one "$transport"
    ranks "transport, a card a rank, NCCL for all sizes" "$n" one COHORT_OWN_MAX_BYTES=0 "$transport"
  done
  # Each process sees its own card alone.
  run "transport, one visible card a process" mpirun -n 2 --timeout "$limit" bash -c \
    'export CUDA_VISIBLE_DEVICES=${OMPI_COMM_WORLD_LOCAL_RANK:-0}; exec "$@"' one_card "$transport"
  # Four ranks as two hosts of two cards: tp=4 over sockets, dcp=2 in windows.
  ranks "two hosts of two cards" 4 pair CUDA_VISIBLE_DEVICES=0,1 "$transport"
  for graph in "" --graph; do
    for plan in staged packed one_kernel; do
      # shellcheck disable=SC2086
      ranks_later "dcp_decode $plan $graph, a card a rank" 2 one CUDA_VISIBLE_DEVICES=0,1 "$decode" \
        "${small[@]}" --tp 2 --dcp 2 --merge "$plan" --symmetric on $graph
    done
    # shellcheck disable=SC2086
    ranks_later "dcp_decode on two hosts of two cards $graph" 4 pair CUDA_VISIBLE_DEVICES=0,1 "$decode" \
      "${small[@]}" --tp 4 --dcp 2 --symmetric on $graph
  done
  run_later
  ranks "visibility guard" 2 one "$bin/gpu_visibility_guard"
}

# survivor WAY HOSTS: a rank is killed among own calls or NCCL's. mpirun's own status is that of the
# rank that was killed, so the counts decide.
survivor() {
  run "a rank killed among calls: $1, hosts: $2" bash -c \
    'mpirun -n 2 --enable-recovery --timeout 100 bash tests/gpu/as_hosts.sh "$@" 2>&1 |
     grep -a "^survivor\|^cohort-test" | tee /dev/stderr |
     grep -q "^cohort-test: passed=[1-9][0-9]* failed=0"' _ "$2" "$bin/gpu_survivor" "$1"
}

# Ranks that are late, stopped, absent or killed, or that make other calls: a card a rank, or two
# ranks that share the only one.
part_faults() {
  local n hosts=one rounds=$( ((full)) && echo 200 || echo 6)
  run "chaos, one card" "$bin/gpu_chaos" 1 --ranks 2 --rounds "$rounds"
  if ((gpus < 2)); then
    skip "chaos with a card a rank: one GPU"
    hosts=rank
  else
    run "chaos, a card a rank" "$bin/gpu_chaos" 2 --ranks 2 --rounds "$rounds"
  fi
  for ((n = 2; n <= (cards < 2 ? 2 : cards); n *= 2)); do
    ranks "late, stopped and absent ranks" "$n" "$hosts" "$bin/gpu_liveness"
  done
  survivor own "$hosts"
  survivor nccl "$hosts"
  if [[ -x $bin/cohort_trace ]]; then
    run "what traces say of ranks that hang" bash tests/gpu/trace.sh "$bin/gpu_survivor" "$bin/cohort_trace" \
      "$hosts"
  else
    skip "what traces say of ranks that hang: no $bin/cohort_trace"
  fi
}

for program in "$own" "$transport" "$decode" "$bin/gpu_liveness" "$bin/gpu_survivor"; do
  if [[ ! -x $program ]]; then
    skip "everything: no $program, which needs MPI"
    finish
  fi
done
if ! command -v mpirun >/dev/null; then
  skip "everything with ranks: no mpirun"
  parts=(one)
fi
cards=$((gpus < 8 ? gpus : 8))
for part in "${parts[@]}"; do
  "part_$part"
done
finish
