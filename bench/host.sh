#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures the host goals with two ranks, prints them as a table, and writes
# bench/results/host-<cpu>-2ranks.json. Arguments go to cohort_bench, whose --help lists them.
#
#   bash bench/host.sh
#   RANKS=4 bash bench/host.sh --bench dcp_merge
#
# Every collective is measured beside MPI's and beside the loop over shared memory that engines have
# of their own. Where MPICH is installed too (mpicxx.mpich and mpirun.mpich), the program is built over
# it in a tree of its own, and the collectives are measured again beside MPICH's, into
# host-<cpu>-2ranks-mpich.json. Run it on an idle machine with at least a core for each rank.
set -euo pipefail
cd "$(dirname "$0")/.."
source cmake/command_line.sh
help_if_asked "$@"
refuse_unknown bench/cohort_bench/options.hpp "$@"
ranks=${RANKS:-2}

bash cmake/build.sh host cohort_bench
source cmake/mpi_env.sh
# The settings of the tests make MPI give way to other programs. Measured against, it must be at its
# best: waiting without giving the core away, unless ranks share cores.
if ((ranks <= $(nproc))); then
  export OMPI_MCA_mpi_yield_when_idle=0
fi

cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1 | tr -cs 'A-Za-z0-9' '-' | sed 's/^-//; s/-$//' | tr 'A-Z' 'a-z')
name=host-${cpu:-unknown}-${ranks}ranks
mkdir -p bench/results

# measure NAME LAUNCHER PROGRAM OPTION...: one run into bench/results/NAME.json.
measure() {
  local out=bench/results/$1.json launcher=$2 program=$3
  shift 3
  timeout 900 "$launcher" -n "$ranks" "$program" --backend host --check --goals --min-bytes 2K --max-bytes 4M \
    --max-seconds 4 --json "$out.part" "$@"
  mv "$out.part" "$out"
  echo "written: $out"
}

measure "$name" mpirun build/host/bin/cohort_bench --modes eager,graph --batches 1,4,16 "$@"
if command -v mpicxx.mpich >/dev/null && command -v mpirun.mpich >/dev/null; then
  cmake -S . -B build/host-mpich -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O2 -g1 -DNDEBUG" \
    -DCOHORT_CUDA=OFF -DCOHORT_MPI=ON -DCOHORT_BUILD_TESTS=OFF -DMPI_CXX_COMPILER="$(command -v mpicxx.mpich)" >build/host-mpich.configure.log
  cmake --build build/host-mpich -j "$(nproc)" --target cohort_bench
  measure "$name-mpich" mpirun.mpich build/host-mpich/bin/cohort_bench --modes eager \
    --bench all_gather,reduce_scatter,all_reduce,all_gather_dim "$@"
fi
