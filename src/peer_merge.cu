// SPDX-License-Identifier: Apache-2.0
#include "peer_merge.cuh"

// The merge of partial attentions in one launch: its paths, and the plain kernels.

namespace cohort::cuda {
namespace detail {
namespace {

// bench/results/own_kernels/nvidia-h200-2cards.json: two H200s, NVLink, 2 ranks, H=128 D=512 bf16,
// graph replay. Flag words took 3.00 us at B=1 (64 KiB sent) against 2.87 for lines, and lines were
// faster at every batch beyond.
constexpr PathRow kMergePaths[] = {{48 << 10, PeerPath::flag_word},
                                   {INT64_MAX, PeerPath::flag_line}};
// Of 2 and 4 splits, combined while they are loaded, words took 4.33 and 3.83 us at B=1, lines 5.57
// and 5.12.
constexpr PathRow kSplitMergePaths[] = {{96 << 10, PeerPath::flag_word},
                                        {INT64_MAX, PeerPath::flag_line}};

}  // namespace

void load_merge(int n) {
  load_merge_kernels<PlainFor>([](int ranks, const auto& call) { with_ranks(ranks, call); }, n);
  load_general_merge(n);
}

void report_merge(int n, std::vector<KernelInfo>& report) {
  with_ranks(n, [&](auto r) {
    report.push_back(describe("merge flag_word bf16",
                              merge_word_kernel<r(), __nv_bfloat16, PlainFor<r()>>, kLlThreads));
    report.push_back(describe("merge flag_line bf16",
                              merge_line_kernel<r(), __nv_bfloat16, PlainFor<r()>>,
                              kLineThreads<r()>));
  });
  report_general_merge(n, report);
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
  const std::int64_t payload = payload_bytes(shape, n);
  return path == PeerPath::flag_word ? payload + lse_words_of(shape, n) * 8 : payload;
}

PeerPath choose_merge_path(const InboxLayout& layout, const MergeShape& shape) {
  const std::int64_t words = merge_lane_bytes(shape, layout.ranks, PeerPath::flag_word);
  const std::int64_t lines = merge_lane_bytes(shape, layout.ranks, PeerPath::flag_line);
  const bool lses_fit = lse_pairs_of(shape, layout.ranks) * 8 <= layout.flag_word_capacity();
  const std::span<const PathRow> paths =
      shape.splits > 1 ? std::span<const PathRow>(kSplitMergePaths) : kMergePaths;
  return choose_path(paths, "peer_merge",
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
  require(peer_merge_obstacle(shape).empty(), "partial", "too many splits for one launch");
  require(is_empty(shape) ||
              (partial.out != nullptr && partial.lse != nullptr &&
               (merged.out != nullptr || shape.rows(table.size).of(table.rank).rows() == 0)),
          "partial, merged", "null pointer");
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_merge_path(table.layout, shape) : path;
  if (is_plain(shape, partial) && is_by_head(shape) && partial.sink == nullptr) {
    launch_merge<PlainFor>([](int n, const auto& call) { with_ranks(n, call); }, table, shape,
                           partial, merged, chosen, stream);
  } else {
    merge_general(table, shape, partial, merged, chosen, stream);
  }
}

}  // namespace cohort::cuda
