// SPDX-License-Identifier: Apache-2.0
#include "elements.cuh"
#include "world.cuh"

// The division of a row's weights against `/`, bit by bit.

namespace cohort::test {
namespace {

__device__ std::uint32_t scrambled(std::uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352dU, x ^= x >> 15, x *= 0x846ca68bU, x ^= x >> 16;
  return x;
}

/// Weights of 0 to 1, subnormal ones among them, by their sum with 1 and by others up to 33.
__global__ void count_wrong(std::uint32_t pairs, unsigned long long* wrong) {
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < pairs;
       i += gridDim.x * blockDim.x) {
    const std::uint32_t bits = scrambled(2 * i) % 0x3f800001U;
    const float weight = i == 0 ? 0.0F : __uint_as_float(bits);
    const float sum = i % 2 == 0
                          ? 1 + weight
                          : 1 + static_cast<float>(scrambled(2 * i + 1)) * (32.0F / 4294967296.0F);
    float weights[2] = {weight, 1};
    cuda::detail::DivideWeights{}(weights, 2, sum);
    const bool right = __float_as_uint(weights[0]) == __float_as_uint(__fdiv_rn(weight, sum)) &&
                       __float_as_uint(weights[1]) == __float_as_uint(__fdiv_rn(1, sum));
    if (!right) {
      atomicAdd(wrong, 1ULL);
    }
  }
}

}  // namespace

void test_division(Tally& tally) {
  constexpr std::uint32_t kPairs = 1U << 28;
  Buffer wrong(sizeof(unsigned long long));
  COHORT_CHECK(cudaMemset(wrong.at(0), 0, sizeof(unsigned long long)));
  count_wrong<<<1024, 256>>>(kPairs, reinterpret_cast<unsigned long long*>(wrong.at(0)));
  COHORT_CHECK(cudaDeviceSynchronize());
  tally.expect(wrong.download<unsigned long long>(1)[0] == 0, "weights divided by their sum");
}

}  // namespace cohort::test
