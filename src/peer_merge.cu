// SPDX-License-Identifier: Apache-2.0
#include "attention.cuh"
#include "peer_enter.cuh"
#include "peer_launch.cuh"
#include "peer_lines.cuh"

// The merge of partial attentions in one launch.

namespace cohort::cuda {
namespace detail {
namespace {

/// A word of the rows that a rank merges.
struct MergePlace {
  std::uint32_t row;
  std::uint32_t batch;
  std::uint32_t head;  ///< Among those of one rank.
  std::uint32_t byte;  ///< Into the row.
};

/// What both kernels are given. `rows` counts the (batch, head) rows that each rank merges, `words`
/// their payload's words of 8 bytes. kAligned: every row starts on 16 bytes.
template <bool kAligned>
struct MergeArgs {
  Rows out;  ///< Partial.
  Strided2 lse;
  Rows merged;
  Strided2 merged_lse;
  FastDiv heads;  ///< Per rank.
  FastDiv words_per_row;
  std::uint32_t rows;
  std::uint32_t words;
  LseBase base;

  __device__ __forceinline__ MergePlace place(std::uint32_t word) const {
    MergePlace p;
    p.row = words_per_row.divide(word);
    p.byte = 8 * (word - p.row * words_per_row.divisor);
    p.batch = heads.divide(p.row);
    p.head = p.row - p.batch * heads.divisor;
    return p;
  }
  /// This rank's partial of what `rank` merges.
  __device__ __forceinline__ uint2 load(int rank, const MergePlace& p) const {
    const std::uint32_t head = static_cast<std::uint32_t>(rank) * heads.divisor + p.head;
    return load_as<uint2>(out.row(p.batch, head) + p.byte, kAligned || out.aligned);
  }
  __device__ __forceinline__ float load_lse(int rank, std::uint32_t row) const {
    const std::uint32_t batch = heads.divide(row);
    const std::uint32_t head = row - batch * heads.divisor;
    return *lse.at(batch, static_cast<std::uint32_t>(rank) * heads.divisor + head);
  }
  /// Those of rows 2i and 2i+1.
  __device__ __forceinline__ uint2 load_lses(int rank, std::uint32_t i) const {
    const float first = 2 * i < rows ? load_lse(rank, 2 * i) : 0.0F;
    const float second = 2 * i + 1 < rows ? load_lse(rank, 2 * i + 1) : 0.0F;
    return make_uint2(__float_as_uint(first), __float_as_uint(second));
  }
  __device__ __forceinline__ void store(const MergePlace& p, uint2 value) const {
    store_as(merged.row(p.batch, p.head) + p.byte, value, kAligned || merged.aligned);
  }
  __device__ __forceinline__ void store_lse(std::uint32_t row, float value) const {
    const std::uint32_t batch = heads.divide(row);
    *merged_lse.at(batch, row - batch * heads.divisor) = value;
  }
};

/// Kernels for a constant number of ranks take aligned rows; the general one, which speaks the same
/// protocol, takes any. So a rank's alignment is its own affair.
template <int kRanks>
using MergeFor = MergeArgs<(kRanks > 0)>;

/// Sends the LSEs, two a flag word, from word `at` of each lane on: words `first` and every
/// worker_count()th. With `words` 0 the one word of an empty call.
template <int kRanks>
__device__ __forceinline__ void send_lses(const Group<kRanks>& g, const Call& c,
                                          const MergeFor<kRanks>& a, std::uint32_t at,
                                          std::uint32_t first, std::uint32_t count) {
  const std::uint32_t step = worker_count();
#pragma unroll 1
  for (std::uint32_t i = first; i < count; i += step) {
    const std::int64_t place = ll_own_place(g, c, at + i);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      ll_store(g.peers[k] + place, a.load_lses(g.rank_at(k), i), c.flag);
    }
  }
}

/// The first LSEs that a thread sends to each peer, loaded while the epoch is on its way.
template <int kRanks>
struct FirstLses {
  uint2 lses[Group<kRanks>::kMost];
  bool any;

  __device__ __forceinline__ FirstLses(const Group<kRanks>& g, const MergeFor<kRanks>& a,
                                       std::uint32_t count)
      : any(sends_ahead<kRanks>(count)) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      lses[k] = any ? a.load_lses(g.rank_at(k), worker_number()) : make_uint2(0, 0);
    }
  }
};

/// Out of line: few blocks come here, in the first moments of a large call.
template <int kRanks>
static __device__ __noinline__ void send_lse(const Group<kRanks>& g, const MergeFor<kRanks>& a,
                                             std::int64_t place, std::uint32_t flag,
                                             std::uint32_t i) {
#pragma unroll 1
  for (int k = 1; k < g.size(); ++k) {
    ll_store(g.peers[k] + place, a.load_lses(g.rank_at(k), i), flag);
  }
}

/// Sends the LSE word `i` that a thread is about to wait for itself, where the block that was to
/// send it may not run yet: behind a block that waits for it, it might never. So a block needs its
/// peers' block of the same number alone, and a merge gets on with one multiprocessor. A word that
/// is sent twice is the same.
///
/// @param all_run  What an earlier call found: whether all blocks run.
/// @param at       Where the LSEs begin in each lane.
template <int kRanks>
__device__ __forceinline__ void cover_lse(const Group<kRanks>& g, const Call& c,
                                          const MergeFor<kRanks>& a, bool& all_run,
                                          std::uint32_t at, std::uint32_t i) {
  if (i >= (blockIdx.x + 1) * workers() && !all_run) {
    all_run = all_arrived(g, c);
    if (!all_run) {
      send_lse(g, a, ll_own_place(g, c, at + i), c.flag, i);
    }
  }
}

/// The same for all rows of a group of lines, in a whole warp.
template <int kRanks>
__device__ __forceinline__ void cover_lses(const Group<kRanks>& g, const Call& c,
                                           const MergeFor<kRanks>& a, bool& all_run,
                                           std::uint32_t group) {
  const std::uint32_t first_word = group * kGroupWords;
  const std::uint32_t last_row = a.words_per_row.divide(min(first_word + kGroupWords, a.words) - 1);
  if (last_row / 2 < (blockIdx.x + 1) * workers()) {
    return;  // its own block or an earlier one has sent them
  }
  const std::uint32_t row = a.words_per_row.divide(first_word) + (threadIdx.x & 31U);
  if (row <= last_row) {
    cover_lse(g, c, a, all_run, 0, row / 2);
  }
  __syncwarp();
}

__device__ __forceinline__ float lse_of(uint4 flag_word, std::uint32_t row) {
  return __uint_as_float((row & 1U) != 0 ? flag_word.z : flag_word.x);
}

/// Merges one word that came as a flag word. False if a wait failed.
template <int kRanks, class T>
__device__ __forceinline__ bool merge_word(const Group<kRanks>& g, const Call& c,
                                           const MergeFor<kRanks>& a, std::uint32_t word,
                                           Patience& patience, bool& all_run) {
  const MergePlace place = a.place(word);
  cover_lse(g, c, a, all_run, a.words, place.row / 2);
  const uint2 own = a.load(g.rank, place);
  const float own_lse = a.load_lse(g.rank, place.row);
  float scales[Group<kRanks>::kMost];
  uint4 values[kBatch<kRanks>] = {};
  const auto receive = [&](int r0) {
    uint4 lses[kBatch<kRanks>] = {};
    return await(g, c, patience, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const bool wanted = is_peer(g, r0 + j);
        ll_load_if(wanted, g.own() + ll_place(g, c, r0 + j, word), values[j]);
        ll_load_if(wanted, g.own() + ll_place(g, c, r0 + j, a.words + place.row / 2), lses[j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        const bool differs =
            is_peer(g, r) && (ll_differs(values[j], c) | ll_differs(lses[j], c)) != 0;
        missing |= differs ? 1U << r : 0U;
        if (r < g.size()) {
          scales[r] = r == g.rank ? own_lse : lse_of(lses[j], place.row);
        }
      }
      return missing;
    });
  };
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (!receive(r0)) {
      return false;
    }
  }
  const float merged_lse = merge_scales(scales, g.size(), a.base);
  WeightedSum<T> sum;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size()) {
        // More ranks than one batch: their words are there, read them again.
        const uint4 value =
            kRanks > 0 || r == g.rank ? values[j] : ll_load(g.own() + ll_place(g, c, r, word));
        sum.add(scales[r], r == g.rank ? own : make_uint2(value.x, value.z));
      }
    }
  }
  a.store(place, sum.result());
  if (place.byte == 0 && a.merged_lse.base != nullptr) {
    a.store_lse(place.row, merged_lse);
  }
  return true;
}

/// Lane: `words` words of payload, then the LSEs.
template <int kRanks, class T>
__global__ void __launch_bounds__(kLlThreads, 1)
    merge_word_kernel(const __grid_constant__ Group<kRanks> g,
                      const __grid_constant__ MergeFor<kRanks> a, std::uint32_t lse_words) {
  Call c;
  Patience patience;
  const Found found = begin(g);
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  // The words for all peers, loaded while the epoch is on its way, where their number is a
  // constant.
  uint2 outgoing[kRanks > 0 ? kRanks : 1];
  const auto load = [&](std::uint32_t i) {
    if constexpr (kRanks > 0) {
      const MergePlace place = a.place(i);
#pragma unroll
      for (int k = 1; k < kRanks; ++k) {
        outgoing[k] = a.load(g.rank_at(k), place);
      }
    }
  };
  if (first < a.words) {
    load(first);
  }
  if (!enter(g, found, c, a.words + lse_words)) {
    return;
  }
  send_lses(g, c, a, a.words, first, lse_words);  // first, because every word of a row needs them
#pragma unroll 1
  for (std::uint32_t i = first; i < a.words;) {
    const std::int64_t place = ll_own_place(g, c, i);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      ll_store(g.peers[k] + place, kRanks > 0 ? outgoing[k] : a.load(g.rank_at(k), a.place(i)),
               c.flag);
    }
    i += step;
    if (i < a.words) {
      load(i);
    }
  }
  delay_point(g, c, 1);
  bool all_run = false;
#pragma unroll 1
  for (std::uint32_t i = first; i < a.words; i += step) {
    if (!merge_word<kRanks, T>(g, c, a, i, patience, all_run)) {
      return;
    }
  }
  if (a.words == 0 && first == 0) {  // an empty call still waits for every peer
    for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
      uint2 values[kBatch<kRanks>];
      if (!ll_receive(g, c, r0, 0, values, patience)) {
        return;
      }
    }
  }
}

/// Merges a group of lines. A group spans at most 31 rows, because a row has at least two words:
/// thread i has the LSEs of the group's row i and hands their scales to those that need them.
/// Returns as `poll_in_warp`.
template <int kRanks, class T>
__device__ __forceinline__ bool merge_lines(const Group<kRanks>& g, const Call& c,
                                            const MergeFor<kRanks>& a, std::uint32_t group,
                                            std::uint32_t& missed) {
  const LinePart part(group);
  const std::uint32_t first_word = group * kGroupWords;
  const std::uint32_t last_word = min(first_word + kGroupWords, a.words) - 1;
  const std::uint32_t first_row = a.words_per_row.divide(first_word);
  const std::uint32_t row = first_row + (threadIdx.x & 31U);
  const bool has_row = row <= a.words_per_row.divide(last_word);
  const bool has_line = part.line * kLineWords < a.words;
  const bool has_first = part.word < a.words;
  const bool has_second = !part.flag && part.word + 1 < a.words;
  const MergePlace first_place = a.place(has_first ? part.word : first_word);
  const MergePlace second_place = a.place(has_second ? part.word + 1 : first_word);
  const uint2 own_first = a.load(g.rank, first_place);
  const uint2 own_second = a.load(g.rank, second_place);
  const float own_lse = has_row ? a.load_lse(g.rank, row) : 0.0F;
  float scales[Group<kRanks>::kMost];
  uint4 values[kBatch<kRanks>] = {};
  const auto receive = [&](int r0, bool again) {
    uint4 lses[kBatch<kRanks>] = {};
    return poll_in_warp(missed, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const bool wanted = is_peer(g, r0 + j);
        ll_load_if(wanted && has_line, g.own() + line_place(g, c, r0 + j, part), values[j]);
        ll_load_if(wanted && has_row && !again, g.own() + ll_place(g, c, r0 + j, row / 2), lses[j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        std::uint32_t differs = 0;
        if (is_peer(g, r)) {
          differs = (has_line ? line_differs(values[j], c, part) : 0) |
                    (has_row && !again ? ll_differs(lses[j], c) : 0);
        }
        missing |= differs != 0 ? 1U << r : 0U;
        if (r < g.size() && !again) {
          scales[r] = r == g.rank ? own_lse : lse_of(lses[j], row);
        }
      }
      return missing;
    });
  };
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (!receive(r0, false)) {
      return false;
    }
  }
  if (has_row) {
    const float merged_lse = merge_scales(scales, g.size(), a.base);
    // The group with a row's first word has the row.
    if (a.merged_lse.base != nullptr && row * a.words_per_row.divisor >= first_word) {
      a.store_lse(row, merged_lse);
    }
  }
  WeightedSum<T> first_sum;
  WeightedSum<T> second_sum;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (kRanks == 0 && !receive(r0, true)) {
      return false;  // more ranks than one batch: the lines are there already, read them again
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size()) {
        const auto scale_of = [&](const MergePlace& place) {
          return __shfl_sync(kFullWarp, scales[r], static_cast<int>(place.row - first_row));
        };
        first_sum.add(scale_of(first_place), r == g.rank ? own_first : low(values[j]));
        second_sum.add(scale_of(second_place), r == g.rank ? own_second : high(values[j]));
      }
    }
  }
  if (has_first) {
    a.store(first_place, first_sum.result());
  }
  if (has_second) {
    a.store(second_place, second_sum.result());
  }
  return true;
}

/// Payload in lines, LSEs in flag words.
template <int kRanks, class T>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    merge_line_kernel(const __grid_constant__ Group<kRanks> g,
                      const __grid_constant__ MergeFor<kRanks> a, std::uint32_t lse_words) {
  Call c;
  const LineRole role(a.words);
  const auto word_for = [&](int rank, std::uint32_t word) { return a.load(rank, a.place(word)); };
  const auto load = [&](std::uint32_t group) {
    return load_for_peers(g, a.words, group, word_for);
  };
  const FirstPlaces<kRanks> places(g, worker_number());
  const Found found = begin(g);
  // Loaded while the epoch is on its way.
  const FirstLses<kRanks> lses(g, a, lse_words);
  PeerLineWords<kRanks> first = {};
  if (role.leads()) {
    first = load(role.first);
  }
  const auto send_first = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      places.store_if(wanted && lses.any, c, k, lses.lses[k]);
    }
  };
  if (!enter(g, found, c, lse_words, send_first)) {
    return;
  }
  send_lses(g, c, a, 0, second_word<kRanks>(), lse_words);
  bool all_run = false;
  exchange_lines(
      g, c, role, first, load,
      [&](std::uint32_t group, const PeerLineWords<kRanks>& loaded) {
        send_to_peers(g, c, a.words, group, loaded, word_for);
      },
      [&](std::uint32_t group, std::uint32_t& missing) {
        cover_lses(g, c, a, all_run, group);
        return merge_lines<kRanks, T>(g, c, a, group, missing);
      });
}

// bench/results/own_kernels/nvidia-h100-2cards.json: two H100s, NVLink, 2 ranks, H=128 D=512 bf16,
// graph replay. Flag words took 2.96 and 3.57 us at B=1 and 2 (64 and 128 KiB sent) against 3.00
// and 3.20 for lines, and lines were faster at every batch beyond.
constexpr PathRow kMergePaths[] = {{96 << 10, PeerPath::flag_word},
                                   {INT64_MAX, PeerPath::flag_line}};

std::int64_t payload_bytes(const MergeShape& s, int n) {
  return s.batch * (s.heads / n) * s.dim * static_cast<std::int64_t>(size_of(s.dtype));
}

template <bool kAligned>
MergeArgs<kAligned> args_of(int n, const MergeShape& s, const Partial& partial,
                            const Merged& merged) {
  const std::size_t element = size_of(s.dtype);
  const std::int64_t heads = s.heads / n;
  return {
      .out = Rows(partial.out, partial.out_batch_stride, partial.out_head_stride, element),
      .lse = {const_cast<float*>(partial.lse), partial.lse_batch_stride, partial.lse_head_stride},
      .merged = Rows(merged.out, merged.out_batch_stride, merged.out_head_stride, element),
      .merged_lse = {merged.lse, merged.lse_batch_stride, merged.lse_head_stride},
      .heads = FastDiv(heads),
      .words_per_row = FastDiv(s.dim * static_cast<std::int64_t>(element) / 8),
      .rows = static_cast<std::uint32_t>(is_empty(s) ? 0 : s.batch * heads),
      .words = static_cast<std::uint32_t>(payload_bytes(s, n) / 8),
      .base = s.base};
}

void merge(const PeerTable& t, const MergeShape& s, const Partial& partial, const Merged& merged,
           PeerPath path, cudaStream_t stream) {
  const auto any = args_of<false>(t.size, s, partial, merged);
  const CallSignature signature = signature_of(s, blocks_of(t));
  const bool words = path == PeerPath::flag_word || any.words == 0;
  const std::int64_t lse_words = std::max<std::int64_t>(ceil_div(any.rows, 2), 1);
  check_ll_words(t, (words ? any.words : 0) + lse_words, "peer_merge");
  if (!words) {
    check_lines(t, any.words, "peer_merge");
  }
  with_float_type(s.dtype, "dtype", [&]<class T>(T*) {
    with_ranks(any.out.aligned && any.merged.aligned ? t.size : 0, [&](auto n) {
      const auto args = args_of<(n() > 0)>(t.size, s, partial, merged);
      const Grid grid = words ? ll_grid(args.words + lse_words, t) : line_grid<n()>(args.words, t);
      launch(words ? merge_word_kernel<n(), T> : merge_line_kernel<n(), T>, grid.blocks,
             grid.threads, stream, Group<n()>(t, signature), args,
             static_cast<std::uint32_t>(lse_words));
    });
  });
}

}  // namespace

void load_merge(int n) {
  const auto load_for = [n]<class T>(T*) {
    with_ranks(n, [](auto r) {
      load(merge_word_kernel<r(), T>);
      load(merge_line_kernel<r(), T>);
    });
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
}

void report_merge(int n, std::vector<KernelInfo>& report) {
  with_ranks(n, [&](auto r) {
    report.push_back(
        describe("merge flag_word bf16", merge_word_kernel<r(), __nv_bfloat16>, kLlThreads));
    report.push_back(
        describe("merge flag_line bf16", merge_line_kernel<r(), __nv_bfloat16>, kLineThreads<r()>));
  });
}

}  // namespace detail

using namespace detail;

std::span<const PathRow> merge_path_table() noexcept { return kMergePaths; }

std::string_view to_string(PeerPath path) noexcept {
  switch (path) {
    case PeerPath::automatic:
      return "automatic";
    case PeerPath::flag_word:
      return "flag_word";
    case PeerPath::flag_line:
      return "flag_line";
  }
  return "unknown";
}

std::int64_t merge_lane_bytes(const MergeShape& shape, int n, PeerPath path) {
  check_merge_shape(shape, n);
  const std::int64_t lse_words = ceil_div(shape.batch * (shape.heads / n), 2);
  const std::int64_t payload = payload_bytes(shape, n);
  return path == PeerPath::flag_word ? payload + std::max<std::int64_t>(lse_words, 1) * 8 : payload;
}

PeerPath choose_merge_path(const InboxLayout& layout, const MergeShape& shape) {
  const std::int64_t words = merge_lane_bytes(shape, layout.ranks, PeerPath::flag_word);
  const std::int64_t lines = merge_lane_bytes(shape, layout.ranks, PeerPath::flag_line);
  const bool lses_fit = words - lines <= layout.flag_word_capacity();  // they travel as flag words
  return choose_path(kMergePaths, "peer_merge",
                     {.sent = words * (layout.ranks - 1),
                      .words_needed = words,
                      .words_there = layout.flag_word_capacity(),
                      .lines_needed = lines,
                      .lines_there = lses_fit ? layout.flag_line_capacity() : -1});
}

void peer_merge(const PeerTable& table, const MergeShape& shape, const Partial& partial,
                const Merged& merged, cudaStream_t stream, PeerPath path) {
  check_table(table);
  check_merge_shape(shape, table.size);
  require(is_empty(shape) ||
              (partial.out != nullptr && partial.lse != nullptr && merged.out != nullptr),
          "partial, merged", "null pointer");
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_merge_path(table.layout, shape) : path;
  merge(table, shape, partial, merged, chosen, stream);
}

}  // namespace cohort::cuda
