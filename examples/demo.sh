#!/usr/bin/env bash
# Installs what is missing, builds, and decodes with a sharded KV cache on four ranks.
set -euo pipefail
cd "$(dirname "$0")/.."

bash cmake/deps.sh
bash cmake/build.sh host dcp_decode
# The GPU parts too where CUDA and NCCL are; the demo itself runs everywhere.
bash cmake/build.sh gpu || [[ $? == 3 ]]

source cmake/mpi_env.sh
mpirun -n 4 build/host/bin/dcp_decode "$@"
