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
                    SymmetricPath path = SymmetricPath::certain, int version = 22907) {
  return place_token(version, collective, path, {.in = in, .out = out});
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

TEST_CASE("of places what peers touch counts, and nothing else", "[call_places]") {
  constexpr std::uint64_t kPlace = (std::uint64_t{1} << 48) + 512;
  for (const std::uint64_t other :
       {std::uint64_t{0}, kPlace + 2, kPlace + (std::uint64_t{1} << 48)}) {
    CAPTURE(other);
    CHECK(token(Collective::all_gather, kPlace, kPlace) !=
          token(Collective::all_gather, kPlace, other));
    const bool in_window = other != 0;
    CHECK((token(Collective::all_gather, kPlace, kPlace) ==
           token(Collective::all_gather, other, kPlace)) == in_window);
    CHECK(token(Collective::reduce_scatter, kPlace, kPlace) !=
          token(Collective::reduce_scatter, other, kPlace));
    CHECK((token(Collective::reduce_scatter, kPlace, kPlace) ==
           token(Collective::reduce_scatter, kPlace, other)) == in_window);
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
    // Where its cost model decides, NCCL may take the ordinary path.
    CHECK(token(collective, 1, 2, SymmetricPath::possible) !=
          token(collective, 1, 2, SymmetricPath::certain));
  }
}

TEST_CASE("whether the buffer that no peer touches lies in a window counts, as NCCL's path does",
          "[call_places]") {
  constexpr std::uint64_t kPlace = (std::uint64_t{1} << 48) + 4096;
  const auto of = [](Collective collective, std::uint64_t in, std::uint64_t out) {
    const auto path = symmetric_path(22907, {.in = in != 0, .out = out != 0});
    return token(collective, in, out, path);
  };
  CHECK(of(Collective::all_gather, kPlace, kPlace) != of(Collective::all_gather, 0, kPlace));
  CHECK(of(Collective::reduce_scatter, kPlace, kPlace) !=
        of(Collective::reduce_scatter, kPlace, 0));
}

TEST_CASE("how input and output lie to each other counts where a version's kernels depend on it",
          "[call_places]") {
  constexpr std::uint64_t kPlace = (std::uint64_t{1} << 48) + 4096;
  constexpr auto kPath = SymmetricPath::certain;
  for (const int version : {22907, 23203}) {
    CAPTURE(version);
    const auto aligned = token(Collective::all_gather, kPlace, kPlace, kPath, version);
    CHECK(aligned == token(Collective::all_gather, kPlace + 16, kPlace, kPath, version));
    CHECK((aligned == token(Collective::all_gather, kPlace + 2, kPlace, kPath, version)) ==
          (version < 23100));
  }
}

TEST_CASE("a norm's path is that of a sum into the output, or of one beside x", "[call_places]") {
  float x[8] = {};
  float elsewhere[8] = {};
  const ConstTensorView rows(static_cast<const float*>(x), DType::f32, {2, 4});
  const TensorView alike(static_cast<float*>(elsewhere), DType::f32, {2, 4});
  const TensorView fp8(static_cast<float*>(elsewhere), DType::f8_e4m3, {2, 4});
  CHECK(sum_before_norm(rows, alike).data() == elsewhere);
  CHECK(sum_before_norm(rows, fp8).data() == x);
  CHECK(sum_before_norm(rows, fp8).dtype() == DType::f32);
  CHECK(sum_before_norm(rows, fp8).shape() == rows.shape());
}
