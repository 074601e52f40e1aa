// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/slot_sizes.hpp>

#include "support/catch.hpp"

using namespace cohort::host;

namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;

}  // namespace

TEST_CASE("tensors are read in windows where they are larger than caches", "[host]") {
  CHECK(is_read_in_window(8 * kMiB, kWindowBytes));
  CHECK_FALSE(is_read_in_window(8 * kMiB - 1, kWindowBytes));
  CHECK(are_parts_read_in_window(16 * kMiB, kWindowBytes));
  CHECK_FALSE(are_parts_read_in_window(16 * kMiB - 1, kWindowBytes));
  CHECK(is_read_in_window(0, 0));
  CHECK(are_parts_read_in_window(0, 0));
  CHECK_FALSE(are_parts_read_in_window(~std::size_t{0}, ~std::size_t{0}));  // without overflow
  CHECK(are_pieces_read_in_window(2 * kKiB));
  CHECK_FALSE(are_pieces_read_in_window(2 * kKiB - 1));
}

TEST_CASE("a piece is a slot, of half a MiB at most", "[host]") {
  CHECK(piece_in_slot(4 * kKiB) == 4 * kKiB);
  CHECK(piece_in_slot(512 * kKiB) == 512 * kKiB);
  CHECK(piece_in_slot(kMiB) == 512 * kKiB);
}

TEST_CASE("each of two ranks reduces all of a piece, each of more all of few lines", "[host]") {
  CHECK(is_reduced_by_all(kMiB, 2, kMiB));
  CHECK_FALSE(is_reduced_by_all(kMiB + 1, 2, kMiB));
  for (const int ranks : {3, 4, 8}) {
    CHECK(is_reduced_by_all(4 * kKiB, ranks, kMiB));
    CHECK_FALSE(is_reduced_by_all(4 * kKiB + 1, ranks, kMiB));
    CHECK_FALSE(is_reduced_by_all(4 * kKiB, ranks, 2 * kKiB));  // it must fit
  }
}
