// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// The blocks of columns in which operands of a warpgroup's matrix products lie in shared memory.
/// Pure.

namespace decode_engine::kernels::wgmma {

inline constexpr int kBlockColumns = 64;
inline constexpr int kBlockRowBytes = 128;

}  // namespace decode_engine::kernels::wgmma
