// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/dtype.hpp>
#include <cohort/float_mode.hpp>
#include <cohort/host/host_backend.hpp>
#include <cohort/host/reduce.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/skip.hpp"
#include "support/threads.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace cohort;
using namespace cohort::test;

#if defined(__x86_64__)

namespace {

constexpr unsigned kFlushAll = 0x8040;  // flush-to-zero and denormals-are-zero
constexpr unsigned kUpwards = 0x4000;

/// What an engine or one of its libraries chose for the thread.
struct Mode {
  explicit Mode(unsigned bits) { _mm_setcsr(_mm_getcsr() | bits); }
  ~Mode() { _mm_setcsr(0x1f80); }
};

std::uint16_t sum(DType dtype, std::uint16_t a, std::uint16_t b) {
  std::uint16_t out = 0;
  const std::array<const std::byte*, 2> sources{reinterpret_cast<const std::byte*>(&a),
                                                reinterpret_cast<const std::byte*>(&b)};
  host::reduce(dtype, ReduceOp::sum, reinterpret_cast<std::byte*>(&out), sources, 1);
  return out;
}

}  // namespace

TEST_CASE("the caller's mode is set aside and comes back", "[float_mode]") {
  const unsigned chosen = GENERATE(0U, kFlushAll, kUpwards, kFlushAll | kUpwards);
  const Mode mode(chosen);
  const unsigned before = _mm_getcsr() & ~0x3fU;
  {
    const DefaultFloatMode inside;
    CHECK((_mm_getcsr() & ~0x3fU) == 0x1f80U);
  }
  CHECK((_mm_getcsr() & ~0x3fU) == before);
}

TEST_CASE("sums of subnormals are right in every mode", "[float_mode]") {
  const Mode mode(GENERATE(0U, kFlushAll, kUpwards));
  CHECK(sum(DType::f16, 0x0001, 0x0001) == 0x0002);
  CHECK(sum(DType::f16, 0x0100, 0x0100) == 0x0200);
  CHECK(sum(DType::bf16, 0x0001, 0x0001) == 0x0002);
  CHECK(sum(DType::f16, 0x3c00, 0x0c01) == 0x3c00);  // 1 and a little: to nearest
}

TEST_CASE("halves become floats without subnormal arithmetic", "[float_mode]") {
  const Mode mode(kFlushAll);
  volatile std::uint16_t least = 1;
  CHECK(std::bit_cast<std::uint32_t>(f16_to_float(least)) == 0x33800000U);
}

TEST_CASE("one rank that flushes subnormals gets the bits that the others get", "[float_mode]") {
  const bool map_peers = GENERATE(true, false);
  run_ranks(2, [map_peers](ControlPlane& plane) {
    const Mode mode(plane.rank() == 0 ? kFlushAll : 0U);  // of this rank's thread
    const auto backend = host_backend({.map_peers = map_peers});
    const auto transport = backend->connect(plane);
    for (const std::size_t count : {std::size_t{67}, std::size_t{65536}}) {
      const auto all_reduce = [&]<class Word>(DType dtype, Word) {
        std::vector<Word> words(count, Word{1});
        const TensorView tensor(words.data(), dtype, Dims{static_cast<std::int64_t>(count)});
        transport->all_reduce(tensor, tensor, ReduceOp::sum, {});
        check_equal(std::count(words.begin(), words.end(), Word{2}),
                    static_cast<std::ptrdiff_t>(count), "the least number and itself");
      };
      all_reduce(DType::f16, std::uint16_t{});
      all_reduce(DType::bf16, std::uint16_t{});
      all_reduce(DType::f32, std::uint32_t{});
    }
  });
}

#else

TEST_CASE("float modes are tested on x86-64", "[float_mode]") { mark_skipped("another processor"); }

#endif
