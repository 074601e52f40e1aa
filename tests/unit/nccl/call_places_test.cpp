// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/call_places.hpp"

#include "support/catch.hpp"

using namespace cohort;

namespace {

constexpr PlaceFacts kFacts{.nccl_runtime_version = 22803,
                            .symmetric_kernel = true,
                            .registered = true,
                            .captured = false,
                            .own_kernels = true};

PlaceFacts with(bool PlaceFacts::*fact, bool value) {
  PlaceFacts facts = kFacts;
  facts.*fact = value;
  return facts;
}

constexpr SymmetricPath kPaths[] = {SymmetricPath::possible, SymmetricPath::certain};

std::uint64_t token(Collective collective, std::uint64_t in, std::uint64_t out,
                    SymmetricPath path = SymmetricPath::certain) {
  return place_token(collective, path, {.in = in, .out = out});
}

}  // namespace

TEST_CASE("eager calls are compared in an own kernel, captured ones by agreement",
          "[call_places]") {
  CHECK(place_check(kFacts) == PlaceCheck::own_kernel);
  CHECK(place_check(with(&PlaceFacts::captured, true)) == PlaceCheck::agreement);
  PlaceFacts unmapped = with(&PlaceFacts::own_kernels, false);
  CHECK(place_check(unmapped) == PlaceCheck::none);
  unmapped.debug_checks = true;
  CHECK(place_check(unmapped) == PlaceCheck::agreement);
  CHECK(place_check(with(&PlaceFacts::debug_checks, true)) == PlaceCheck::agreement);
  unmapped.debug_checks = false;
  unmapped.captured = true;
  CHECK(place_check(unmapped) == PlaceCheck::agreement);
}

TEST_CASE("nothing is compared where NCCL cannot take its symmetric path", "[call_places]") {
  for (const bool captured : {false, true}) {
    for (const auto fact : {&PlaceFacts::registered, &PlaceFacts::symmetric_kernel}) {
      PlaceFacts facts = with(fact, false);
      facts.captured = captured;
      CHECK(place_check(facts) == PlaceCheck::none);
    }
    PlaceFacts facts = with(&PlaceFacts::captured, captured);
    facts.nccl_runtime_version = kMinNcclForWindows - 1;
    CHECK(place_check(facts) == PlaceCheck::none);
    facts.nccl_runtime_version = 23203;
    CHECK(place_check(facts) != PlaceCheck::none);
  }
}

TEST_CASE("what peers touch counts, and nothing else", "[call_places]") {
  constexpr std::uint64_t kPlace = (std::uint64_t{1} << 48) + 512;
  for (const std::uint64_t other :
       {std::uint64_t{0}, kPlace + 2, kPlace + (std::uint64_t{1} << 48)}) {
    CAPTURE(other);
    CHECK(token(Collective::all_gather, kPlace, kPlace) !=
          token(Collective::all_gather, kPlace, other));
    CHECK(token(Collective::all_gather, kPlace, kPlace) ==
          token(Collective::all_gather, other, kPlace));
    CHECK(token(Collective::reduce_scatter, kPlace, kPlace) !=
          token(Collective::reduce_scatter, other, kPlace));
    CHECK(token(Collective::reduce_scatter, kPlace, kPlace) ==
          token(Collective::reduce_scatter, kPlace, other));
    CHECK(token(Collective::all_reduce, kPlace, kPlace) !=
          token(Collective::all_reduce, other, kPlace));
    CHECK(token(Collective::all_reduce, kPlace, kPlace) !=
          token(Collective::all_reduce, kPlace, other));
    CHECK(token(Collective::all_reduce, kPlace, other) !=
          token(Collective::all_reduce, other, kPlace));
  }
}

TEST_CASE(
    "a rank on the ordinary path differs from those on the symmetric one, wherever its "
    "buffers lie",
    "[call_places]") {
  for (const auto collective :
       {Collective::all_gather, Collective::reduce_scatter, Collective::all_reduce}) {
    const std::uint64_t ordinary = token(collective, 1, 2, SymmetricPath::never);
    CHECK(ordinary == token(collective, 3, 4, SymmetricPath::never));
    for (const auto path : kPaths) {
      CHECK(ordinary != token(collective, 0, 0, path));
      CHECK(ordinary != token(collective, 1, 2, path));
    }
    // Which kernel NCCL takes follows from what peers touch.
    CHECK(token(collective, 1, 2, SymmetricPath::possible) ==
          token(collective, 1, 2, SymmetricPath::certain));
  }
}
