// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../decode_engine/operations.hpp"

/// \file
/// Attention in fp64, which a kernel's results are held to. Every launch throws
/// `cohort::TransportError` where CUDA refuses it.

namespace decode_attention {

/// Of sequence b and head h at b * heads + h.
struct Exact {
  double* out = nullptr;        ///< [batch, heads, latent]
  double* magnitude = nullptr;  ///< The same of the values' magnitudes.
  double* lse = nullptr;        ///< [batch, heads], base e
};

/// Works them out. Of at most `kMostTokens` tokens a sequence.
inline constexpr std::int64_t kMostTokens = 8192;
void attend_exactly(const decode_engine::Attention& attention, const Exact& exact,
                    cudaStream_t stream);

/// Adds to *wrong how many results of a kernel differ by more than bf16 allows: weights and results
/// are rounded, each by a share of 2^-9, and so is what weights are divided by.
void count_wrong(const decode_engine::Attention& attention, const Exact& exact,
                 unsigned long long* wrong, cudaStream_t stream);

}  // namespace decode_attention
