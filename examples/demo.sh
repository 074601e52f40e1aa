#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing, builds, and decodes with a sharded KV cache: on four ranks of this host,
# and, where there is a GPU, on this card. Builds the decode and the README's first program, nothing else.
# Arguments go to both decodes; build/host/bin/dcp_decode --help lists them.
#
#   bash examples/demo.sh
#   bash examples/demo.sh --steps 4
set -euo pipefail
cd "$(dirname "$0")/.."
source cmake/command_line.sh
help_if_asked "$@"
refuse_unknown examples/dcp_decode/options.cpp "$@"

bash cmake/deps.sh
export COHORT_QUICK=ON  # no speed is measured
bash cmake/build.sh host dcp_decode first_program

source cmake/mpi_env.sh
mpirun -n 4 build/host/bin/dcp_decode "$@"

# Only the architectures of the cards here, such as 90, are built for.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
  tr -d '. ' | LC_ALL=C sort -u | paste -s -d ';') || true
if [[ ! $architecture =~ ^[0-9\;]+$ ]]; then
  echo "on the host alone: no GPU on this machine"
  exit 0
fi
cards=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
ranks=$((cards >= 4 ? 4 : cards >= 2 ? 2 : 1))
echo "building the decode for architecture $architecture, that of the card"
status=0
CUDAARCHS=$architecture bash cmake/build.sh gpu dcp_decode || status=$?
if ((status == 3)); then
  echo "on the host alone: there is a GPU, and the reason above why the GPU parts cannot be built"
  exit 0
fi
((status == 0)) || exit "$status"
echo "decoding on $ranks of $cards GPUs"
mpirun -n "$ranks" build/gpu/bin/dcp_decode --backend cuda "$@"
