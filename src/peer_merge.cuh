// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "peer_launch.cuh"
#include "peer_merge_lines.cuh"
#include "peer_merge_words.cuh"

// How the kernels that merge partial attentions in one launch are launched. Those for the plain
// merge, of one split a rank by head, and for all others are compiled apart.

namespace cohort::cuda::detail {
namespace {

/// One launch with arguments `ArgsFor<ranks>`. `with_kernels(n, call)` calls `call` with the number
/// of ranks as a constant, for which there are kernels, or 0.
template <template <int> class ArgsFor, class WithKernels>
void launch_merge(const WithKernels& with_kernels, const PeerTable& t, const MergeShape& s,
                  const Partial& partial, const Merged& merged, PeerPath path,
                  cudaStream_t stream) {
  const ArgsFor<0> any(t.size, s, partial, merged);
  const CallSignature signature = signature_of(s, blocks_of(t));
  const bool words = path == PeerPath::flag_word || any.words == 0;
  const std::int64_t lse_words = words ? lse_words_of(s, t.size) : lse_pairs_of(s, t.size);
  check_ll_words(t, (words ? any.words : 0) + lse_words, "peer_merge");
  if (!words) {
    check_lines(t, any.words, "peer_merge");
  }
  with_float_type(s.dtype, "dtype", [&]<class T>(T*) {
    with_kernels(any.is_aligned() ? t.size : 0, [&](auto n) {
      using Args = ArgsFor<n()>;
      const Args args(t.size, s, partial, merged);
      const Grid grid =
          words ? ll_grid(std::max(args.words, 1U), t) : line_grid<n()>(args.words, t);
      launch(words ? merge_word_kernel<n(), T, Args> : merge_line_kernel<n(), T, Args>, grid.blocks,
             grid.threads, stream, Group<n()>(t, signature), args,
             static_cast<std::uint32_t>(lse_words));
    });
  });
}

template <template <int> class ArgsFor, class WithKernels>
void load_merge_kernels(const WithKernels& with_kernels, int n) {
  const auto load_for = [&]<class T>(T*) {
    with_kernels(n, [](auto r) {
      load(merge_word_kernel<r(), T, ArgsFor<r()>>);
      load(merge_line_kernel<r(), T, ArgsFor<r()>>);
    });
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
}

}  // namespace

/// Merges other than the plain one; as `launch_merge`.
void merge_general(const PeerTable& table, const MergeShape& shape, const Partial& partial,
                   const Merged& merged, PeerPath path, cudaStream_t stream);

}  // namespace cohort::cuda::detail
