#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures what this machine's GPUs allow, and writes bench/results/<gpu>-<ranks>ranks.json:
#
#   bash bench/gpu.sh                 all GPUs; on one GPU, two ranks that share it
#   RANKS=4 bash bench/gpu.sh         four ranks (on one GPU: all of them share it)
#   QUICK=1 bash bench/gpu.sh         fewer sizes
#   ONLY=decode_engine bash bench/gpu.sh  the whole decode alone, into bench/results/decode_engine/
#
# On one GPU every rank has an NCCL_HOSTID of its own, because NCCL refuses two ranks of one host on
# one card; it then uses sockets, windows are refused, and the ranks take turns on the card. Such
# figures show that everything works and is right, not how fast it is.
#
# TORCH=1 adds the same rows through PyTorch, where that is installed. NVLink multicast stays off.
# Every program has a time limit; all together stay below eight minutes, and the whole decode, which
# is measured only where ONLY names it, below nine.
set -uo pipefail
cd "$(dirname "$0")/.."
source cmake/command_line.sh
help_if_asked "$@"
[[ $# == 0 ]] || refuse "$1"
export NCCL_NVLS_ENABLE=0
export TORCH_SYMM_MEM_DISABLE_MULTICAST=1
unset COHORT_OWN_MAX_BYTES COHORT_MERGE_PLAN

gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)
if ((gpus == 0)); then
  echo "cohort-skip: gpu.sh: this machine has no GPU"
  exit 77
fi
only=${ONLY:-cohort_bench}
[[ $only == cohort_bench || $only == decode_engine ]] || { echo "gpu.sh: ONLY=$only: expected cohort_bench or decode_engine"; exit 2; }
program=build/gpu/bin/$only
if [[ ! -x $program ]]; then
  bash cmake/build.sh gpu "$only" || { echo "gpu.sh: $only cannot be built here"; exit 1; }
fi
source cmake/mpi_env.sh

ranks=${RANKS:-$((gpus > 1 ? gpus : 2))}
name=gpu
if command -v nvidia-smi >/dev/null; then
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9' '-' | sed 's/^-//; s/-$//' | tr 'A-Z' 'a-z')
fi

launch=(mpirun -n "$ranks")

if ((ranks > gpus)); then
  shared=1
  name+=-shared
  export NCCL_SOCKET_IFNAME=lo
  # shellcheck disable=SC2016  # for the shell of each rank
  launch+=(bash -c 'export NCCL_HOSTID=cohort-bench-$OMPI_COMM_WORLD_RANK; exec "$@"' rank)
else
  shared=0
fi
out=bench/results/$name-${ranks}ranks.json
both=(--check --goals)
if [[ $only == decode_engine ]]; then
  both=()
fi
mkdir -p bench/results/decode_engine

# part SECONDS OPTION...: one run of the program; its rows are added to the result file.
status=0
[[ $only == decode_engine ]] || rm -f "$out"
part() {
  local seconds=$1 ended=0
  shift
  rm -f "$out.part"
  timeout --signal=INT --kill-after=10 "$seconds" "${launch[@]}" "$program" --backend cuda "${both[@]}" \
    --json "$out.part" "$@" || ended=$?
  if [[ -s $out.part ]]; then
    if [[ -e $out ]]; then tail -n +2 "$out.part" >>"$out"; else cp "$out.part" "$out"; fi
    rm -f "$out.part"
  fi
  if ((ended != 0)); then
    echo "gpu.sh: $only $* ended with status $ended"
    status=1
  fi
}

# into NAME: the parts behind it have a result file of their own.
into() {
  out=bench/results/$only/$name-${ranks}ranks-$1.json
  rm -f "$out"
}

collectives=all_gather,reduce_scatter,all_reduce,all_gather_dim
partials=merge_by_token,merge_replicated,merge_splits,merge_sink,gather_quantised,place_step
if [[ $only == decode_engine ]]; then
  # A file for each model.
  v3=(--preset v3 --ways tp-raw,tp-cohort,dcp-raw,dcp-cohort)
  into tiny
  part 60 --preset tiny --iters 0
  into many # sequences, whose attention is not split
  part 60 --preset tiny --prompts 140 --tokens 16 --fp64 0 --iters 0 --ways tp-cohort,dcp-cohort
  into widths # of V3's attention, in fp64 as well
  part 60 --weights random --latent 512 --rope 64 --heads 128 --nope 16 --value 8 --hidden 256 --query-rank 64 \
    --inner 256 --vocabulary 301 --prompts 4 --fp64 150 --iters 0
  into v3-accuracy
  part 60 "${v3[@]}" --layers 2 --vocabulary 8192 --iters 0
  if ((!shared)); then
    into v3
    part 90 "${v3[@]}" --tokens 0 --contexts 1K,8K,32K,128K --batches 1,8 --iters 25
    part 90 "${v3[@]}" --tokens 0 --contexts 1K,8K,32K,128K --batches 64 --fill 128K --iters 7
  fi
elif ((shared)); then
  few=(--iters 5 --warmup 1 --max-seconds 3)
  part 75 --bench "$collectives" --modes graph --min-bytes 2K --max-bytes 512K --factor 16 "${few[@]}"
  part 60 --bench gather_query,dcp_merge --modes graph --batches 1,16 "${few[@]}"
  part 45 --bench all_reduce_norm --modes graph --batches 1,16 "${few[@]}"
  part 60 --bench "$partials" --modes graph --batches 1,16 "${few[@]}"
  part 50 --bench decode_step --batches 1 --iters 3 --warmup 1 --max-seconds 4
  part 30 --bench arena,scope,recorder,registration,formation --iters 10 --warmup 1
else
  factor=$((${QUICK:-0} ? 8 : 2))
  part 150 --bench "$collectives" --min-bytes 2K --max-bytes 64M --factor "$factor" --iters 30 --max-seconds 1
  part 60 --bench gather_query,dcp_merge --batches 1,4,8,16,64,128 --iters 60 --max-seconds 2
  part 60 --bench all_reduce_norm --modes graph --batches 1,2,4,8,16,32,64 --iters 60 --max-seconds 1
  part 90 --bench "$partials" --batches 1,4,8,16,64,128 --iters 60 --max-seconds 1
  part 60 --bench decode_step --batches 1,16,128 --iters 50 --max-seconds 6
  part 40 --bench all_gather,all_reduce,gather_query,dcp_merge --modes issue --min-bytes 2K --max-bytes 2K --batches 1 --iters 60
  part 30 --bench arena,scope,recorder,registration,formation --iters 30
fi
echo "written: $([[ $only == decode_engine ]] && echo "bench/results/$only/$name-${ranks}ranks-*.json" || echo "$out")"
if ((status == 0)) && python3 -c 'import torch' 2>/dev/null && ((!shared)) && ((${TORCH:-0})); then
  timeout 120 mpirun -n "$ranks" python3 bench/torch_baseline.py --check \
    --json "bench/results/$name-${ranks}ranks-torch.json" || status=1
fi
exit $status
