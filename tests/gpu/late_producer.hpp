// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cohort/dtype.hpp"

/// \file
/// Kernels of the visibility guard's test, on bf16.

namespace cohort::test {

/// counter += 1.
void advance(std::uint32_t* counter, cudaStream_t stream);

/// data[i] = (7 i + 13 counter + 5 rank) mod 64. Triggers programmatic launch completion at its
/// start, as attention kernels do, and finishes late: one block spins first.
void produce_late(BFloat16* data, std::int64_t count, const std::uint32_t* counter, int rank,
                  cudaStream_t stream);

/// Adds to `wrong` the elements of an all-gather of `ranks` shares of `share` elements that are not
/// what the producers wrote in the counter's round.
void check_gathered(const BFloat16* data, std::int64_t share, int ranks,
                    const std::uint32_t* counter, std::uint64_t* wrong, cudaStream_t stream);

/// As above, for this rank's share of a reduce-scatter by sum.
void check_scattered(const BFloat16* data, std::int64_t share, int ranks, int rank,
                     const std::uint32_t* counter, std::uint64_t* wrong, cudaStream_t stream);

}  // namespace cohort::test
