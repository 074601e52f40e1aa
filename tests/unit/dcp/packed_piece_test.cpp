// SPDX-License-Identifier: Apache-2.0
#include "cohort/dcp/packed_piece.hpp"

#include "support/catch.hpp"

using cohort::dcp::packed_piece;

TEST_CASE("a piece holds outputs, then LSEs, each padded to 16 bytes", "[packed_piece]") {
  const auto piece = packed_piece(4, 16, 512, 2);  // 64 rows
  CHECK(piece.lse_offset == 64 * 512 * 2);
  CHECK(piece.bytes == 64 * 512 * 2 + 64 * 4);

  const auto odd = packed_piece(1, 3, 5, 2);  // 30 bytes of outputs, 12 of LSEs
  CHECK(odd.lse_offset == 32);
  CHECK(odd.bytes == 48);
}

TEST_CASE("a piece without rows takes nothing", "[packed_piece]") {
  CHECK(packed_piece(0, 16, 512, 2).bytes == 0);
  CHECK(packed_piece(4, 0, 512, 2).bytes == 0);
  const auto no_values = packed_piece(2, 3, 0, 4);
  CHECK(no_values.lse_offset == 0);
  CHECK(no_values.bytes == 32);
}
