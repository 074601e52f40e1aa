// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/cuda/inbox.hpp"
#include "cohort/cuda/norm_plan.hpp"
#include "cohort/cuda/path_sizes.hpp"
#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/merge_rows.hpp"
#include "cohort/dtype.hpp"

/// \file
/// The library's own kernels, as functions that enqueue one launch on a stream.
///
/// All of them return at once, can be captured, allocate nothing, and, but for `peer_meet`, are
/// launched with programmatic stream serialization: a kernel may be scheduled while its predecessor
/// in the stream drains, but every thread waits for the predecessor's memory before it touches any,
/// and none triggers its own completion early but a query gather that is told to. So they are
/// ordered like ordinary kernels.
///
/// Pointers are device memory of the current device. Strides of tensors count elements. Every
/// function throws `UsageError` for arguments that it cannot take, before the launch, and
/// `TransportError` if CUDA refuses the launch.
///
/// **Local kernels** touch the caller's memory only. **Peer kernels** take a `PeerTable` and are
/// collective: every rank issues the same sequence of peer kernels with the same shapes on its own
/// stream order. They synchronise through the inboxes alone (see inbox.hpp): after one has run, its
/// outputs are complete, and the peers may still be reading nothing of the caller's. A wait that
/// exceeds the inbox's time limit sets the error word; see `read_inbox_error`.

namespace cohort::cuda {

// --- local kernels
// --------------------------------------------------------------------------------

inline constexpr int kMaxCopyDims = 5;

/// out[i] = in[i] for every index of a tensor of up to `kMaxCopyDims` dimensions, whatever the
/// strides: packing and unpacking for collectives along a dimension. Dimensions that can be read as
/// one are joined first; accesses are 16 bytes wide where alignment allows. A stride of 0 in `in`
/// broadcasts. `in` and `out` do not overlap. All spans have one length.
void strided_copy(const void* in, std::span<const std::int64_t> in_strides, void* out,
                  std::span<const std::int64_t> out_strides, std::span<const std::int64_t> shape,
                  DType dtype, cudaStream_t stream);

/// Sets `count` elements to a value. Floating types and 32-bit integers.
void fill(void* out, std::int64_t count, DType dtype, double value, cudaStream_t stream);

/// out[i] = pieces[0][i] + pieces[1][i] + ... in order, accumulated in fp32 and rounded once.
/// `pieces` are `n` blocks of `count` elements, `piece_stride` elements apart. f32, f16, bf16.
void reduce_pieces(const void* pieces, int n, std::int64_t piece_stride, void* out,
                   std::int64_t count, DType dtype, cudaStream_t stream);

/// Partial attentions of one rank: out [S,B,H,D] and lse [S,B,H], in any order of dimensions with D
/// contiguous. [H,B,D] is a choice of strides.
struct Partial {
  const void* out = nullptr;
  std::int64_t out_batch_stride = 0;
  std::int64_t out_head_stride = 0;
  const float* lse = nullptr;
  std::int64_t lse_batch_stride = 0;
  std::int64_t lse_head_stride = 0;
  std::int64_t out_split_stride = 0;
  std::int64_t lse_split_stride = 0;
  const float* sink = nullptr;  ///< [H], or null; those of the rows that this rank merges are read.
  std::int64_t sink_stride = 1;
  const std::int32_t* local_tokens = nullptr;  ///< [B], or null; rows with 0 or less are empty.
  std::int64_t local_tokens_stride = 1;
};

/// A merged attention: out [B,H/n,D], or what else the rank's rows are, with D contiguous, and lse
/// [B,H/n] unless null.
struct Merged {
  void* out = nullptr;
  std::int64_t out_batch_stride = 0;
  std::int64_t out_head_stride = 0;
  float* lse = nullptr;
  std::int64_t lse_batch_stride = 0;
  std::int64_t lse_head_stride = 0;
};

/// Sizes of a merge, and what else its ranks agree on. `heads` counts all heads, H. D is a multiple
/// of 8, at most 1024; f32, f16, bf16.
struct MergeShape {
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t dim = 0;
  DType dtype = DType::bf16;
  LseBase base = LseBase::e;
  std::int64_t splits = 1;                    ///< S
  MergeResult result = MergeResult::by_head;  ///< As in dcp/merge_rows.hpp, like the next two.
  bool whole = false;
  std::span<const std::int64_t> counts = {};
  bool sink = false;         ///< Whether there is one.
  bool gathers_lse = false;  ///< Replicated: whether there is an LSE.

  /// Which rows each of `n` ranks merges.
  [[nodiscard]] constexpr dcp::MergeRows rows(int n) const noexcept {
    return {result, batch, heads, n, counts, whole};
  }
};

/// Staged plan, before the reduce-scatter: corrected = scale of `rank` times its row, combined of
/// its splits, where the scales come from every rank's LSE. Zero, and the partial not read, where
/// the scale is 0.
///
/// @param lses       [n,B,H] contiguous, all-gathered, in rank order.
/// @param corrected  [B,H,D] by strides; its type is `out_dtype`: the partial's own or f32.
void correct_partial(const MergeShape& shape, int n, int rank, const Partial& partial,
                     const float* lses, void* corrected, std::int64_t out_batch_stride,
                     std::int64_t out_head_stride, DType out_dtype, cudaStream_t stream);

/// Bytes from one rank's piece to the next in the packed plan's buffers. A piece holds the rows of
/// out that its rank merges, then their lse, with room for as many as any rank has: the layout of
/// dcp/packed_piece.hpp.
[[nodiscard]] std::size_t packed_piece_bytes(const MergeShape& shape, int n);

/// Packed plan, before the all-to-all: piece p of `pieces` receives the rows that rank p merges.
void pack_partial(const MergeShape& shape, int n, const Partial& partial, void* pieces,
                  cudaStream_t stream);

/// Packed plan, after the all-to-all: merges the n received pieces. Bitwise equal to
/// `peer_merge`. Of `partial` only the sink is read.
void merge_pieces(const MergeShape& shape, int n, int rank, const void* pieces,
                  const Partial& partial, const Merged& merged, cudaStream_t stream);

/// A query in two parts: nope [B,h,Dn] and pe [B,h,Dr], each with its last dimension contiguous.
/// Dn and Dr are multiples of 16 bytes (Dr may be 0).
struct Query {
  const void* nope = nullptr;
  std::int64_t nope_batch_stride = 0;
  std::int64_t nope_head_stride = 0;
  const void* pe = nullptr;
  std::int64_t pe_batch_stride = 0;
  std::int64_t pe_head_stride = 0;
  std::int64_t batch = 0;
  std::int64_t heads = 0;  ///< h: the heads that this rank holds.
  std::int64_t nope_dim = 0;
  std::int64_t pe_dim = 0;
  DType dtype = DType::bf16;  ///< Any; moved as bytes.
  std::int64_t types = 0;     ///< What else the ranks agree on: `QueryTypes::number`.
  /// Of `peer_gather_query`: whether the next kernel may be launched while this one waits for
  /// peers.
  bool successor_waits = false;
};

/// out [B,h,Dn+Dr] by strides = nope and pe side by side.
void pack_query(const Query& query, void* out, std::int64_t out_batch_stride,
                std::int64_t out_head_stride, cudaStream_t stream);

/// A residual and an RMS norm of rows without gaps, on which nothing that is written may lie.
struct Norm {
  NormShape shape;
  const void* x = nullptr;       ///< [rows, hidden]: what is added to the residual.
  void* residual = nullptr;      ///< [rows, hidden], read and written.
  const void* weight = nullptr;  ///< [hidden]
  void* out = nullptr;  ///< [rows, hidden] in the output's type; `rms_norm`: or `x` itself.
  const float* scale = nullptr;  ///< Of an output in f8_e4m3 alone: one element.
  float epsilon = 0;
};

/// residual += x, rounded to the type; out = residual / sqrt(mean of its squares + epsilon) *
/// weight, in fp32 from the rounded residual on, and rounded once; or that times the reciprocal of
/// the scale, in fp32, to the nearest of f8_e4m3 within +-448.
///
/// The order of fp32 sums: a row is taken in groups of 60 words of 8 bytes, those in lines of 15,
/// of which thread k of eight has words 2k and 2k+1. A thread adds its squares in order with fused
/// multiply-adds; 32 threads' sums of a group, and then up to 32 sums of every 32nd group in order,
/// are added in a butterfly, the farthest first. That times the reciprocal of `hidden` is the mean;
/// the reciprocal of its root is the card's, within two units in the last place. So the bits depend
/// on the row and the kind of card alone.
void rms_norm(const Norm& norm, cudaStream_t stream);

// --- peer kernels
// ---------------------------------------------------------------------------------

/// How a peer kernel moves its bytes.
enum class PeerPath : std::uint8_t {
  automatic,  ///< By size; see `choose_merge_path`, `choose_query_path`, `choose_share_path`.
  flag_word,  ///< Every 8 bytes travel with their epoch as a flag: one flight, twice the bytes.
  /// Every 120 bytes travel with their epoch in one line of 128: one flight, 1/15 more bytes. Needs
  /// links that keep a line's store whole, as NVLink and a card's own memory do; elsewhere the
  /// inbox must have no room for lines.
  flag_line,
};

[[nodiscard]] std::string_view to_string(PeerPath path) noexcept;

/// One row of a size table: use `path` while a rank sends at most this many bytes to all peers.
struct PathRow {
  std::int64_t max_bytes_sent;
  PeerPath path;
};

/// The size tables of the merge, the query gather, and all-gathers and reduce-scatters.
[[nodiscard]] std::span<const PathRow> merge_path_table() noexcept;
[[nodiscard]] std::span<const PathRow> query_path_table() noexcept;
[[nodiscard]] std::span<const PathRow> share_path_table() noexcept;

/// The path of a call: the table's, or the nearest that the inbox has room for.
/// @throw UsageError with the bytes needed and the bytes there, if the inbox has room for none.
[[nodiscard]] PeerPath choose_merge_path(const InboxLayout& layout, const MergeShape& shape);
[[nodiscard]] PeerPath choose_query_path(const InboxLayout& layout, const Query& query);
/// Of an all-gather or a reduce-scatter; `share_bytes` is one rank's.
[[nodiscard]] PeerPath choose_share_path(const InboxLayout& layout, std::int64_t share_bytes);

/// Bytes of one lane that a call needs, for `InboxOptions`: flag words, or flag lines.
[[nodiscard]] std::int64_t merge_lane_bytes(const MergeShape& shape, int n, PeerPath path);
[[nodiscard]] std::int64_t query_lane_bytes(const Query& query, PeerPath path);

/// An all-gather or a reduce-scatter along any dimension, as bytes. `outer` is the product of the
/// extents before the dimension, `inner_bytes` the bytes of one rank's share per outer index.
/// The side that only this rank holds is [outer][inner]; the side with every rank's share is
/// [outer][n][inner]. Strides are bytes between consecutive indices.
struct AlongDim {
  std::int64_t outer = 1;
  std::int64_t inner_bytes = 0;
  std::int64_t share_outer_stride = 0;  ///< [outer][inner] side.
  std::int64_t full_outer_stride = 0;   ///< [outer][n][inner] side.
  std::int64_t full_rank_stride = 0;    ///< From one rank's share to the next.
  /// The product of the extents before the dimension, also of tensors that a rank has packed, whose
  /// `outer` is 1. Ranks compare it.
  std::int64_t before = 1;
  std::int64_t form = 0;  ///< What the ranks compare besides; see `Transport::agree_also`.

  /// Both sides contiguous.
  [[nodiscard]] static constexpr AlongDim contiguous(std::int64_t outer, std::int64_t inner_bytes,
                                                     int n) noexcept {
    return {outer, inner_bytes, inner_bytes, inner_bytes * n, inner_bytes, outer};
  }
  /// Packed shares one behind the other, of tensors with `before` as above.
  [[nodiscard]] static constexpr AlongDim packed(std::int64_t share_bytes, int n,
                                                 std::int64_t before) noexcept {
    return {1, share_bytes, share_bytes, share_bytes * n, share_bytes, before};
  }
};

/// Most bytes that one rank's share may have in an all-gather or a reduce-scatter.
[[nodiscard]] constexpr std::int64_t max_share_bytes(const InboxLayout& layout) noexcept {
  return std::max(layout.flag_word_capacity(), layout.flag_line_capacity());
}

/// How an all-reduce of `bytes` goes, if it fits, by the given path or the faster one.
[[nodiscard]] constexpr AllReducePlan choose_all_reduce_plan(
    const InboxLayout& layout, std::int64_t bytes, PeerPath path = PeerPath::automatic) noexcept {
  return all_reduce_plan(layout.ranks, bytes,
                         path == PeerPath::flag_line ? 0 : layout.flag_word_capacity(),
                         path == PeerPath::flag_word ? 0 : layout.flag_line_capacity());
}

/// in [outer][inner] -> out [outer][n][inner] on every rank. Moves bytes.
void peer_all_gather(const PeerTable& table, const AlongDim& dims, const void* in, void* out,
                     cudaStream_t stream, PeerPath path = PeerPath::automatic);

/// in [outer][n][inner] -> out [outer][inner]: the ranks' sum of this rank's share, in rank order,
/// accumulated in fp32 and rounded once, whatever the path. f32, f16, bf16. `out` may be this
/// rank's share of `in`.
void peer_reduce_scatter(const PeerTable& table, const AlongDim& dims, DType dtype, const void* in,
                         void* out, cudaStream_t stream, PeerPath path = PeerPath::automatic);

/// out[i] = sum over the ranks of in[i], in rank order, accumulated in fp32 and rounded once; the
/// same bits on every rank, whatever the path. `out` may be `in`. f32, f16, bf16. `form` is what
/// the ranks compare besides.
void peer_all_reduce(const PeerTable& table, std::int64_t count, DType dtype, const void* in,
                     void* out, cudaStream_t stream, PeerPath path = PeerPath::automatic,
                     std::int64_t form = 0);

/// How `peer_all_reduce_rms_norm` goes by the given path or the faster one, if in one launch.
[[nodiscard]] constexpr NormPlan choose_norm_plan(const InboxLayout& layout, const NormShape& shape,
                                                  PeerPath path = PeerPath::automatic) noexcept {
  return norm_plan(layout.ranks, shape, path == PeerPath::flag_line ? 0 : layout.ll_words,
                   path == PeerPath::flag_word ? 0 : layout.lines);
}

/// Clusters of the blocks of `peer_all_reduce_rms_norm` in groups of `n` ranks that the current
/// device, or what this process has of it, runs at once where nothing else does; see
/// `cluster_budget`. None where it has no clusters.
/// @throw TransportError if CUDA refuses.
[[nodiscard]] ClusterRoom norm_cluster_room(int n);

/// `peer_all_reduce` of `norm.x` and `rms_norm` of the sum in one launch; bitwise equal to the two,
/// whatever the path. `out` may not be `x`.
void peer_all_reduce_rms_norm(const PeerTable& table, const Norm& norm, cudaStream_t stream,
                              PeerPath path = PeerPath::automatic);

/// Returns on the stream when every rank has reached it; what the ranks wrote before is visible
/// after. The floor of every peer kernel.
void peer_barrier(const PeerTable& table, cudaStream_t stream);

/// The same before a call over NCCL, on whose signature the ranks must agree: the group fails where
/// they do not. Launched without programmatic stream serialization, so it begins when the work
/// before it has ended and its writes are visible: it is a visibility guard as well (see
/// nccl/visibility_guard.hpp).
void peer_meet(const PeerTable& table, CallSignature call, cudaStream_t stream);

/// Query gather: every rank's packed query, [B,n*h,Dn+Dr] by strides, the heads of rank r from r*h.
/// nope and pe are read once.
void peer_gather_query(const PeerTable& table, const Query& query, void* out,
                       std::int64_t out_batch_stride, std::int64_t out_head_stride,
                       cudaStream_t stream, PeerPath path = PeerPath::automatic);

/// Merge in one launch: rank r gets the merged heads [r*H/n, (r+1)*H/n), or the rows that the shape
/// says. Up to four splits are combined while they are loaded. fp32 in rank order; bitwise equal to
/// `merge_pieces`, whatever the path.
void peer_merge(const PeerTable& table, const MergeShape& shape, const Partial& partial,
                const Merged& merged, cudaStream_t stream, PeerPath path = PeerPath::automatic);

// --- what the kernels are
// -------------------------------------------------------------------------

/// Resources of one compiled kernel, as launched.
struct KernelInfo {
  std::string name;
  int registers = 0;
  std::size_t local_bytes = 0;  ///< Per thread; spills and arrays that are not in registers.
  std::size_t shared_bytes = 0;
  int threads = 0;        ///< Largest block that is launched.
  int blocks_per_sm = 0;  ///< Resident at that size.
};

/// Has the current device load every peer kernel that groups of `n` ranks launch: under lazy
/// loading the first launch would, and may wait there for kernels that run.
/// @throw TransportError if CUDA refuses.
void load_kernels(int n);
/// The same for the kernels that wait for nobody: they stand behind some that do.
void load_local_kernels();

/// Every peer kernel for `n` ranks, and the local ones. Needs a device.
[[nodiscard]] std::vector<KernelInfo> kernel_report(int n);

}  // namespace cohort::cuda
