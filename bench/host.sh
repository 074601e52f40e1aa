#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures the host goals with two ranks, prints them as a table, and writes
# bench/results/host-<cpu>-2ranks.json. Arguments go to cohort_bench, whose --help lists them.
#
#   bash bench/host.sh
#   RANKS=4 bash bench/host.sh --bench dcp_merge
#
# Run it on an idle machine with at least a core for each rank.
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
out=bench/results/host-${cpu:-unknown}-${ranks}ranks.json
mkdir -p bench/results
bench=(timeout 900 mpirun -n "$ranks" build/host/bin/cohort_bench --backend host --check)
"${bench[@]}" --goals --modes eager,graph --min-bytes 2K --max-bytes 4M --batches 1,4,16 \
  --max-seconds 4 --json "$out.part" "$@"
mv "$out.part" "$out"
echo "written: $out"
