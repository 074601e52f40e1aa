// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// The backend for NVIDIA cards and NCCL. Link with cohort::cuda.

#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/peer_mapping.hpp"
#include "cohort/nccl/cuda_backend.hpp"
