// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>

#include "cohort/cuda/inbox.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/dtype.hpp"

/// \file
/// The shapes that the kernels take, local ones and those between peers: their units are words of 8
/// and vectors of 16 bytes, and their indices have 32 bits. Pure. Each function says what is in the
/// way, or nothing.

namespace cohort::cuda {

/// Bytes that one call must stay below.
inline constexpr std::int64_t kTooManyBytes = std::int64_t{1} << 31;

/// Of a merge by `ranks` ranks, whatever its plan. Shapes without elements are never in the way.
[[nodiscard]] inline std::string merge_obstacle(const MergeShape& s, int ranks) {
  if (ranks < 1 || ranks > kMaxPeers) {
    return fmt::format("n: expected 1 to {} ranks, got {}", kMaxPeers, ranks);
  }
  if (s.batch < 0 || s.heads < 0 || s.dim < 0 || s.heads % ranks != 0) {
    return fmt::format(
        "shape: expected sizes >= 0 and heads that {} ranks divide, got [{}, {}, {}]", ranks,
        s.batch, s.heads, s.dim);
  }
  if (!is_attention_dtype(s.dtype)) {
    return fmt::format("out: expected f32, f16 or bf16, got {}", to_string(s.dtype));
  }
  if (s.batch == 0 || s.heads == 0 || s.dim == 0) {
    return {};
  }
  if (s.dim % 8 != 0 || s.dim > 1024) {
    return fmt::format("D: expected a multiple of 8, at most 1024, got {}", s.dim);
  }
  const std::int64_t bytes =
      s.batch * s.heads * s.dim * static_cast<std::int64_t>(size_of(s.dtype));
  if (bytes >= kTooManyBytes) {
    return fmt::format("out: expected less than {} bytes, got [{}, {}, {}] of {}, {} bytes",
                       kTooManyBytes, s.batch, s.heads, s.dim, to_string(s.dtype), bytes);
  }
  return {};
}

/// Of a query's parts on one rank, whether ranks can address each other or not.
[[nodiscard]] inline std::string query_obstacle(const Query& q) {
  if (q.batch < 0 || q.heads < 0 || q.nope_dim < 0 || q.pe_dim < 0) {
    return "q_nope and q_pe: expected sizes >= 0";
  }
  if (q.batch == 0 || q.heads == 0 || q.nope_dim + q.pe_dim == 0) {
    return {};
  }
  const auto element = static_cast<std::int64_t>(size_of(q.dtype));
  if (q.nope_dim < 1 || q.nope_dim * element % 16 != 0 || q.pe_dim * element % 16 != 0) {
    return fmt::format(
        "q_nope and q_pe: expected last dimensions of a multiple of 16 bytes, Dn at least that, "
        "got "
        "{} and {} of {}",
        q.nope_dim, q.pe_dim, to_string(q.dtype));
  }
  const std::int64_t bytes = q.batch * q.heads * (q.nope_dim + q.pe_dim) * element;
  if (bytes >= kTooManyBytes) {
    return fmt::format("q_nope and q_pe: expected less than {} bytes on a rank, got {}",
                       kTooManyBytes, bytes);
  }
  return {};
}

}  // namespace cohort::cuda
