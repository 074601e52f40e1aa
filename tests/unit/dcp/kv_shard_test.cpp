// SPDX-License-Identifier: Apache-2.0
#include <cohort/dcp/kv_shard.hpp>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::dcp::KvShard;
using test::says;
using Counts = std::vector<std::int64_t>;

namespace {
constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
}

TEST_CASE("token t is on rank t mod n", "[kv_shard]") {
  const KvShard shard(3);
  const std::vector<int> owners = {0, 1, 2, 0, 1, 2, 0};
  const Counts locals = {0, 0, 0, 1, 1, 1, 2};
  for (std::size_t t = 0; t < owners.size(); ++t) {
    CHECK(shard.owner(static_cast<std::int64_t>(t)) == owners[t]);
    CHECK(shard.local_index(static_cast<std::int64_t>(t)) == locals[t]);
  }
}

TEST_CASE("blocks of tokens stay together", "[kv_shard]") {
  const KvShard shard(2, 2);
  const std::vector<int> owners = {0, 0, 1, 1, 0, 0, 1, 1, 0};
  const Counts locals = {0, 1, 0, 1, 2, 3, 2, 3, 4};
  for (std::size_t t = 0; t < owners.size(); ++t) {
    CHECK(shard.owner(static_cast<std::int64_t>(t)) == owners[t]);
    CHECK(shard.local_index(static_cast<std::int64_t>(t)) == locals[t]);
  }
  CHECK(shard.local_count(3, 0) == 2);
  CHECK(shard.local_count(3, 1) == 1);
  CHECK(shard.local_count(9, 0) == 5);
  CHECK(shard.local_count(9, 1) == 4);
}

TEST_CASE("a sequence shorter than the group leaves ranks without tokens", "[kv_shard]") {
  const KvShard shard(4);
  const Counts lengths = {0, 1, 3, 4, 5, 9};
  CHECK(shard.local_counts(lengths, 0) == Counts{0, 1, 1, 1, 2, 3});
  CHECK(shard.local_counts(lengths, 2) == Counts{0, 0, 1, 1, 1, 2});
  CHECK(shard.local_counts(lengths, 3) == Counts{0, 0, 0, 1, 1, 2});
  CHECK(shard.local_counts(Counts{}, 3).empty());
}

TEST_CASE("appending token by token visits what the formulas say", "[kv_shard]") {
  for (int n = 1; n <= 16; ++n) {
    for (const std::int64_t interleave : {1, 2, 3, 16, 64}) {
      const KvShard shard(n, interleave);
      Counts held(static_cast<std::size_t>(n), 0);
      const std::int64_t tokens = 3 * n * interleave + 5;
      for (std::int64_t length = 0; length < tokens; ++length) {
        INFO("n " << n << " interleave " << interleave << " length " << length);
        for (int rank = 0; rank < n; ++rank) {
          if (shard.local_count(length, rank) != held[static_cast<std::size_t>(rank)]) {
            FAIL("rank " << rank);
          }
        }
        const int owner = shard.owner(length);
        auto& slot = held[static_cast<std::size_t>(owner)];
        REQUIRE(shard.local_index(length) == slot);
        REQUIRE(shard.global_index(owner, slot) == length);
        ++slot;
      }
      const auto [least, most] = std::ranges::minmax(held);
      CHECK(most - least <= interleave);
    }
  }
}

TEST_CASE("the largest numbers do not overflow", "[kv_shard]") {
  for (const int n : {1, 2, 7, 8}) {
    for (const std::int64_t interleave : {std::int64_t{1}, std::int64_t{3}, kMax / n}) {
      const KvShard shard(n, interleave);
      INFO("n " << n << " interleave " << interleave);
      std::uint64_t sum = 0;
      for (int rank = 0; rank < n; ++rank) {
        const std::int64_t count = shard.local_count(kMax, rank);
        REQUIRE(count >= 0);
        sum += static_cast<std::uint64_t>(count);
        if (count > 0) {
          const std::int64_t last = shard.global_index(rank, count - 1);
          CHECK(shard.owner(last) == rank);
          CHECK(shard.local_index(last) == count - 1);
        }
      }
      CHECK(sum == static_cast<std::uint64_t>(kMax));
      CHECK(shard.global_index(shard.owner(kMax), shard.local_index(kMax)) == kMax);
    }
  }
  CHECK_THROWS_MATCHES(KvShard(2).global_index(0, kMax), UsageError, says("local", "rank 0"));
  CHECK_NOTHROW(KvShard(2).global_index(1, kMax / 2));
  CHECK_THROWS_AS(KvShard(2).global_index(1, kMax / 2 + 1), UsageError);
  CHECK(KvShard(1).global_index(0, kMax) == kMax);
}

TEST_CASE("bad arguments are refused by name", "[kv_shard]") {
  CHECK_THROWS_MATCHES(KvShard(0), ConfigError, says("ranks", "0"));
  CHECK_THROWS_MATCHES(KvShard(-1), ConfigError, says("-1"));
  CHECK_THROWS_MATCHES(KvShard(4, 0), ConfigError, says("interleave", "0"));
  CHECK_THROWS_MATCHES(KvShard(4, kMax / 2), ConfigError, says("overflow"));

  const KvShard shard(4, 2);
  CHECK_THROWS_MATCHES(shard.owner(-1), UsageError, says("token", "-1"));
  CHECK_THROWS_MATCHES(shard.local_index(-5), UsageError, says("token", "-5"));
  CHECK_THROWS_MATCHES(shard.local_count(-2, 0), UsageError, says("length", "-2"));
  CHECK_THROWS_MATCHES(shard.local_count(8, 4), UsageError, says("rank", "0 to 3", "4"));
  CHECK_THROWS_AS(shard.local_count(8, -1), UsageError);
  CHECK_THROWS_MATCHES(shard.global_index(4, 0), UsageError, says("rank"));
  CHECK_THROWS_MATCHES(shard.global_index(0, -1), UsageError, says("local", "-1"));
}

TEST_CASE("a refused batch leaves the counts alone", "[kv_shard]") {
  const KvShard shard(2);
  const Counts lengths = {4, -1, 6};
  Counts counts = {7, 7, 7};
  CHECK_THROWS_MATCHES(shard.local_counts(lengths, 0, counts), UsageError, says("lengths", "-1"));
  CHECK(counts == Counts{7, 7, 7});
  Counts short_counts = {7, 7};
  CHECK_THROWS_MATCHES(shard.local_counts(Counts{1, 2, 3}, 0, short_counts), UsageError,
                       says("counts", "3", "2"));
  CHECK_THROWS_AS(shard.local_counts(Counts{}, 2), UsageError);

  Counts in_place = {4, 5, 6};
  shard.local_counts(in_place, 1, in_place);
  CHECK(in_place == Counts{2, 2, 3});
}

TEST_CASE("equal placements compare equal", "[kv_shard]") {
  CHECK(KvShard(4, 2) == KvShard(4, 2));
  CHECK_FALSE(KvShard(4, 2) == KvShard(4, 1));
  CHECK_FALSE(KvShard(4, 2) == KvShard(2, 2));
}
