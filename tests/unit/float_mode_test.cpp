#include <cohort/dtype.hpp>
#include <cohort/float_mode.hpp>
#include <cohort/host/reduce.hpp>

#include "support/catch.hpp"
#include "support/skip.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace cohort;

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

#else

TEST_CASE("float modes are tested on x86-64", "[float_mode]") {
  test::mark_skipped("another processor");
}

#endif
