// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>

#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/cuda/support_kernels.hpp"
#include "cohort/dtype.hpp"

/// \file
/// The shapes that the kernels take, local ones and those between peers: their units are words of 8
/// and vectors of 16 bytes, and their indices have 32 bits. Pure. Each function says what is in the
/// way, or nothing. And what ranks compare of them: whatever decides where a word of the payload
/// comes from or goes to, as every rank sees it, so no strides.

namespace cohort::cuda {

/// Bytes that one call must stay below.
inline constexpr std::int64_t kTooManyBytes = std::int64_t{1} << 31;

/// Whether there is nothing to merge.
[[nodiscard]] constexpr bool is_empty(const MergeShape& s) noexcept {
  return s.batch == 0 || s.heads == 0 || s.dim == 0;
}

[[nodiscard]] constexpr std::int64_t row_element(const MergeShape& s) noexcept {
  return static_cast<std::int64_t>(size_of(s.dtype));
}

/// Of a merge by `ranks` ranks, whatever its plan. Shapes without elements are never in the way.
[[nodiscard]] inline std::string merge_obstacle(const MergeShape& s, int ranks) {
  if (ranks < 1 || ranks > kMaxPeers) {
    return fmt::format("n: expected 1 to {} ranks, got {}", kMaxPeers, ranks);
  }
  const bool by_token = s.result == MergeResult::by_token;
  if (s.batch < 0 || s.heads < 0 || s.dim < 0 || (!by_token && s.heads % ranks != 0)) {
    return fmt::format(
        "shape: expected sizes >= 0 and heads that {} ranks divide, got [{}, {}, {}]", ranks,
        s.batch, s.heads, s.dim);
  }
  if (!is_attention_dtype(s.dtype)) {
    return fmt::format("out: expected f32, f16 or bf16, got {}", to_string(s.dtype));
  }
  if (is_empty(s)) {
    return {};
  }
  if (s.splits < 1 || s.splits > kMaxLseRanks) {
    return fmt::format("S: expected 1 to {} splits, got {}", kMaxLseRanks, s.splits);
  }
  if (s.dim % 8 != 0 || s.dim > 1024) {
    return fmt::format("D: expected a multiple of 8, at most 1024, got {}", s.dim);
  }
  const std::int64_t bytes = s.batch * s.heads * s.dim * row_element(s);
  if (bytes >= kTooManyBytes) {
    return fmt::format("out: expected less than {} bytes, got [{}, {}, {}] of {}, {} bytes",
                       kTooManyBytes, s.batch, s.heads, s.dim, to_string(s.dtype), bytes);
  }
  // Vectors of all ranks' pieces, whose number must have 31 bits: for 17 ranks and more, where one
  // has most rows.
  if (s.rows(ranks).widest() * ranks >= kTooManyBytes * 16 / (s.dim * row_element(s))) {
    return fmt::format("out: too many rows of {} bytes for pieces of {} ranks",
                       s.dim * row_element(s), ranks);
  }
  return {};
}

/// Of a merge in one launch, beyond that.
inline constexpr std::int64_t kMostPeerSplits = 4;
[[nodiscard]] inline std::string peer_merge_obstacle(const MergeShape& s) {
  return s.splits <= kMostPeerSplits ? std::string()
                                     : fmt::format("one launch combines up to {} splits, got {}",
                                                   kMostPeerSplits, s.splits);
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

/// Of a merge. Blocks of one number wait for each other, so how many a launch may have, `blocks`,
/// is part of every signature.
[[nodiscard]] constexpr CallSignature signature_of(const MergeShape& s, int blocks) noexcept {
  std::uint64_t counts = 0;
  for (const std::int64_t count : s.counts) {
    counts = counts * 1'000'003 + static_cast<std::uint64_t>(count);
  }
  const std::int64_t form = static_cast<std::int64_t>(s.base) + (s.sink ? 2 : 0) +
                            (s.gathers_lse ? 4 : 0) + static_cast<std::int64_t>(s.result) * 8 +
                            s.splits * 32;
  return CallSignature::make(
      PeerCall::merge, {static_cast<std::int64_t>(s.dtype), blocks, s.batch, s.heads, s.dim, form,
                        static_cast<std::int64_t>(counts)});
}

/// Of a query gather.
[[nodiscard]] constexpr CallSignature signature_of(const Query& q, int blocks) noexcept {
  return CallSignature::make(PeerCall::gather_query,
                             {static_cast<std::int64_t>(q.dtype), blocks, q.batch, q.heads,
                              q.nope_dim, q.pe_dim, q.types});
}

/// Of an all-gather or a reduce-scatter. Where the dimension lies decides which bytes of the whole
/// are a rank's, while shares along any have one size.
[[nodiscard]] constexpr CallSignature signature_of(PeerCall call, DType dtype, const AlongDim& dims,
                                                   int blocks) noexcept {
  return CallSignature::make(call, {static_cast<std::int64_t>(dtype), blocks,
                                    dims.outer * dims.inner_bytes, dims.before, dims.form});
}

/// Of an all-reduce of so many bytes, or a barrier.
[[nodiscard]] constexpr CallSignature signature_of(PeerCall call, DType dtype, std::int64_t bytes,
                                                   int blocks, std::int64_t form = 0) noexcept {
  return CallSignature::make(call, {static_cast<std::int64_t>(dtype), blocks, bytes, form});
}

}  // namespace cohort::cuda
