// SPDX-License-Identifier: Apache-2.0
#include "cohort/control_frame.hpp"

#include <cstddef>
#include <set>
#include <span>
#include <string>

#include "cohort/control_plane.hpp"
#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::detail;

TEST_CASE("a message is its payload, untouched, and the trailer that was put behind it") {
  for (const std::size_t size : {0U, 1U, 100U}) {
    Bytes message = copy_with_room(Bytes(size, std::byte{7}));
    const std::byte* const place = message.data();
    append(message, {0x0123456789abcdefU, ControlCall::exchange, 0xfffffff0U});
    REQUIRE(message.size() == size + ControlPlane::kTrailerBytes);
    CHECK(Bytes(message.begin(), message.begin() + static_cast<std::ptrdiff_t>(size)) ==
          Bytes(size, std::byte{7}));
    CHECK(message.data() == place);  // nothing is moved for the trailer
    const auto trailer = trailer_of(message);
    REQUIRE(trailer);
    CHECK(trailer->channel == 0x0123456789abcdefU);
    CHECK(trailer->call == ControlCall::exchange);
    CHECK(trailer->sequence == 0xfffffff0U);
  }
}

TEST_CASE("bytes that no trailer fits into are no message") {
  CHECK_FALSE(trailer_of({}));
  CHECK_FALSE(trailer_of(Bytes(ControlPlane::kTrailerBytes - 1)));
  CHECK(trailer_of(Bytes(ControlPlane::kTrailerBytes)));
}

TEST_CASE("each kind of message has a name of its own, and what is none has one too") {
  std::set<std::string> names;
  for (std::uint32_t call = 0; call <= 8; ++call) {
    names.emplace(to_string(static_cast<ControlCall>(call)));
  }
  CHECK(names.size() == 9);
  CHECK(names.count("unknown call") == 1);
}
