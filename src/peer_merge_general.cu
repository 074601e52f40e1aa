// SPDX-License-Identifier: Apache-2.0
#include "peer_merge.cuh"

// The merge of several splits, with sinks, of ranks without tokens, by token, or of everything on
// every rank. Two ranks have kernels of their own, all other numbers share one, which loads what it
// sends to one peer after the other.

namespace cohort::cuda::detail {
namespace {

template <class Call>
void with_general_ranks(int n, const Call& call) {
  if (n == 2) {
    call(std::integral_constant<int, 2>{});
  } else {
    call(std::integral_constant<int, 0>{});
  }
}
constexpr auto kWithRanks = [](int n, const auto& call) { with_general_ranks(n, call); };

}  // namespace

void merge_general(const PeerTable& table, const MergeShape& shape, const Partial& partial,
                   const Merged& merged, PeerPath path, cudaStream_t stream) {
  launch_merge<GeneralFor>(kWithRanks, table, shape, partial, merged, path, stream);
}

void load_general_merge(int n) { load_merge_kernels<GeneralFor>(kWithRanks, n); }

void report_general_merge(int n, std::vector<KernelInfo>& report) {
  with_general_ranks(n, [&](auto r) {
    report.push_back(describe("merge flag_word bf16, general",
                              merge_word_kernel<r(), __nv_bfloat16, GeneralFor<r()>>, kLlThreads));
    report.push_back(describe("merge flag_line bf16, general",
                              merge_line_kernel<r(), __nv_bfloat16, GeneralFor<r()>>,
                              kLineThreads<r()>));
  });
}

}  // namespace cohort::cuda::detail
