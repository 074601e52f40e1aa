// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include "attention_work.cuh"

/// \file
/// Where a block's results go: to memory, or first to the other splits of its cluster.

namespace decode_engine::kernels {

/// The columns of a head's result from one on.
template <class S>
__device__ __forceinline__ BFloat16* whole_result(const Attention& a, const Share& share, int head,
                                                  int column) {
  return a.out + ((share.first_head + head) * a.batch + share.sequence) * S::kLatent + column;
}

/// Of a thread that adds up, whose first column is of `own`: writes them. A warp has whole rows of
/// its columns. Those of all tokens are copied from where tiles were, in whole lines; parts of them
/// take their time whichever way, as there is twice as much of them. Those of a cluster stay there
/// for all of its splits.
template <class S, int kElements>
__device__ __forceinline__ void write_results(const Attention& a, const Splits& splits,
                                              const Work<S>& work, const float (&out)[kElements],
                                              int own) {
  const Share share(a, splits);
  const bool whole = splits.count == 1;
  const unsigned column = static_cast<unsigned>(own) + first_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned head = upper_head() + 8 * half;
    const float sum = wgmma::load(work.sum(head));
    const float inverse = sum > 0 ? 1 / sum : 0;
    const auto each = [&](auto put) {
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
        put(2 * i, out[i + 2 * half] * inverse, out[i + 2 * half + 1] * inverse);
      }
    };
    if (whole) {
      const unsigned to = work.result(head, column, 2);
      each([to](int i, float x, float y) {
        wgmma::store(to + static_cast<unsigned>(i) * 2, __floats2bfloat162_rn(x, y));
      });
    } else if (splits.together) {
      const unsigned to = work.result(head, column, 4);
      each(
          [to](int i, float x, float y) { wgmma::store(to + static_cast<unsigned>(i) * 4, x, y); });
    } else if (static_cast<int>(head) < share.heads) {
      float* const to = splits.sums + share.result(a, static_cast<int>(head)) * S::kLatent + column;
      each([to](int i, float x, float y) {
        *reinterpret_cast<float2*>(to + i) = make_float2(x, y);
      });
    }
  }
  if (!whole) {
    return;
  }
  wgmma::publish();
  __syncwarp();
  const unsigned head = wgmma::thread() % kGroup / 32 * 16 + wgmma::thread() % 32;
  if (wgmma::thread() % 32 < 16 && static_cast<int>(head) < share.heads) {
    wgmma::copy_out(whole_result<S>(a, share, static_cast<int>(head), own),
                    work.result(head, static_cast<unsigned>(own), 2), S::kColumns * 2);
    wgmma::finish_copies();
  }
}

/// All threads of the cluster, behind `write_results`: each of its `kTogether` splits combines all
/// of them for as many of the heads.
template <class S, int kTogether>
__device__ __forceinline__ void combine(const Attention& a, const Share& share,
                                        const Work<S>& work) {
  constexpr int kFours = S::kLatent / 4;
  constexpr int kAtOnce = kThreads / kFours;  // heads
  constexpr int kHeads = kTile / kTogether;
  const unsigned sharing = Sharing(a).count;
  const unsigned rank = wgmma::block_in_cluster();
  const int first = static_cast<int>(rank / sharing) * kHeads;
  const int end = min(first + kHeads, share.heads);
  const int column = static_cast<int>(threadIdx.x) % kFours * 4;
  int head = first + static_cast<int>(threadIdx.x) / kFours;
  unsigned there[kTogether];
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    there[i] = wgmma::address_in(rank % sharing + static_cast<unsigned>(i) * sharing, work.begin);
  }
  BFloat16* to = whole_result<S>(a, share, head, column);
  unsigned lse_place = S::kLses + static_cast<unsigned>(head) * 4;
  unsigned place =
      static_cast<unsigned>(head) * S::result_row(4) + static_cast<unsigned>(column) * 4;
#pragma unroll(8 / kTogether)
  for (; head < end; head += kAtOnce) {
    float lses[kTogether];
    float4 parts[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      lses[i] = wgmma::load_there(there[i] + lse_place);
      parts[i] = wgmma::load4_there(there[i] + place);
    }
    float largest = lses[0];
#pragma unroll
    for (int i = 1; i < kTogether; ++i) {
      largest = fmaxf(largest, lses[i]);
    }
    float total = 0;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float weight = largest == -CUDART_INF_F ? 0 : power((lses[i] - largest) * 1.44269504F);
      total += weight;
      sum.x += weight * parts[i].x;
      sum.y += weight * parts[i].y;
      sum.z += weight * parts[i].z;
      sum.w += weight * parts[i].w;
    }
    const float inverse = total > 0 ? 1 / total : 0;
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(sum.x * inverse, sum.y * inverse),
                                     __floats2bfloat162_rn(sum.z * inverse, sum.w * inverse)};
    *reinterpret_cast<uint2*>(to) = reinterpret_cast<const uint2&>(pairs);
    if (column == 0) {
      a.lse[share.sequence * a.heads + share.first_head + head] =
          total > 0 ? largest + logf(total) : -CUDART_INF_F;
    }
    to += kAtOnce * a.batch * S::kLatent;
    lse_place += kAtOnce * 4;
    place += kAtOnce * S::result_row(4);
  }
}

template <class S>
__device__ __forceinline__ void combine_in_cluster(const Attention& a, const Splits& splits,
                                                   const Work<S>& work) {
  wgmma::meet_cluster();
  const Share share(a, splits);
  if (splits.count == 2) {
    combine<S, 2>(a, share, work);
  } else if (splits.count == 4) {
    combine<S, 4>(a, share, work);
  } else {
    combine<S, 8>(a, share, work);
  }
}

}  // namespace decode_engine::kernels
