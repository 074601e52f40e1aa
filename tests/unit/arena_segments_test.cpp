// SPDX-License-Identifier: Apache-2.0
#include "cohort/arena_segments.hpp"

#include <cohort/host/host_backend.hpp>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

constexpr std::size_t kPages = std::size_t{1} << 16;

}  // namespace

TEST_CASE("segments lie apart in one space of offsets", "[arena]") {
  const auto backend = host_backend();
  ArenaSegments segments(*backend, "work", {});
  CHECK_FALSE(segments.has_audience());
  const auto first = segments.add(kPages, 0);
  const auto second = segments.add(2 * kPages - 1, 0);
  CHECK(first.offset == 0);
  CHECK(first.bytes == kPages);
  CHECK(second.offset == std::uint64_t{1} << 44);
  CHECK(second.bytes == 2 * kPages);
  CHECK(segments.count() == 2);
  for (const auto offset : {first.offset, first.offset + kPages - 1, second.offset + 5}) {
    CHECK(segments.offset_of(segments.address(offset)) == offset);
  }
  CHECK_FALSE(segments.offset_of(&segments));
  CHECK(segments.holding(second.offset + 5)->data() == segments.address(second.offset));
  CHECK(segments.holding(second.offset + 5)->bytes() == 2 * kPages);
}

TEST_CASE("what has segments of other sizes has another hash", "[arena]") {
  const auto backend = host_backend();
  ArenaSegments a(*backend, "a", {});
  ArenaSegments b(*backend, "b", {});
  CHECK(a.mixed(7) == 7);
  a.add(kPages, 0);
  CHECK(a.mixed(7) != b.mixed(7));
  b.add(kPages, 0);
  CHECK(a.mixed(7) == b.mixed(7));
}

TEST_CASE("a segment that cannot be changes nothing", "[arena]") {
  const auto backend = host_backend({.segment_limit = kPages});
  ArenaSegments segments(*backend, "work", {});
  CHECK_THROWS_AS(segments.add(2 * kPages, 0), TransportError);
  CHECK_THROWS_MATCHES(segments.add(std::size_t{1} << 45, 0), UsageError,
                       says("arena work", "too large"));
  CHECK(segments.count() == 0);
  CHECK(segments.add(kPages, 0).offset == 0);
}

TEST_CASE("memory that somebody holds outlives the segments", "[arena]") {
  const auto backend = host_backend();
  ArenaSegments segments(*backend, "work", {});
  segments.add(kPages, 0);
  const std::shared_ptr<Segment> held = segments.holding(0);
  auto* const bytes = static_cast<std::byte*>(segments.address(0));
  segments.deregister();
  segments.free();
  CHECK(segments.count() == 0);
  CHECK_FALSE(segments.offset_of(bytes));
  bytes[held->bytes() - 1] = std::byte{7};
  CHECK(held->data() == bytes);
}

TEST_CASE("groups without a place to agree in are refused", "[arena]") {
  const auto backend = host_backend();
  CHECK_THROWS_MATCHES(
      ArenaSegments(*backend, "work", {.control = nullptr, .transports = {nullptr}}), UsageError,
      says("arena work", "control plane"));
}
