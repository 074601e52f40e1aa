// SPDX-License-Identifier: Apache-2.0
#include <cohort/hash.hpp>
#include <cstdint>
#include <set>

#include "support/catch.hpp"

using namespace cohort::detail;

TEST_CASE("a hash tells words, their order and their number apart") {
  // The first step by hand: the seed of FNV-1a times its prime, then the shift.
  constexpr std::uint64_t kFirst = kHashSeed * 0x100000001b3ULL;
  CHECK(mix(kHashSeed, 0) == (kFirst ^ (kFirst >> 29)));
  CHECK(mix(mix(kHashSeed, 1), 2) != mix(mix(kHashSeed, 2), 1));
  CHECK(mix(kHashSeed, 0) != kHashSeed);
  CHECK(mix(mix(kHashSeed, 0), 0) != mix(kHashSeed, 0));
  std::set<std::uint64_t> seen;
  for (std::uint64_t bit = 0; bit < 64; ++bit) {
    seen.insert(mix(kHashSeed, std::uint64_t{1} << bit));
  }
  CHECK(seen.size() == 64);
  CHECK(hash_text("") == kHashSeed);
  CHECK(hash_text("ab") == mix(mix(kHashSeed, 'a'), 'b'));
  CHECK(hash_text("\xff") == mix(kHashSeed, 0xff));  // not the word that -1 is
}
