// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

/// \file
/// Kernels of the benchmark itself.

namespace cohort::bench {

/// Occupies one block for so many clock cycles. Where the next kernel waits for its end by itself
/// (`griddepcontrol.wait`), that may be launched as soon as this has begun.
void launch_spin(long long cycles, bool next_waits, cudaStream_t stream);

/// Copies by 16-byte loads and stores of the whole device. Addresses and size are multiples of 16;
/// either side may be a peer's memory.
void launch_copy(void* to, const void* from, std::size_t bytes, int blocks, cudaStream_t stream);

}  // namespace cohort::bench
