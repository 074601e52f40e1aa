// SPDX-License-Identifier: Apache-2.0
#include "../bench/decode_engine/attention_layout.hpp"

#include <algorithm>
#include <vector>

#include "support/catch.hpp"

namespace {

using decode_engine::kernels::AttentionLayout;
using decode_engine::kernels::kBlockBytes;
using decode_engine::kernels::kPlaces;
using decode_engine::kernels::kTile;

struct Range {
  unsigned begin, bytes, alignment;
};

template <class Layout>
std::vector<Range> ranges() {
  std::vector<Range> all = {{Layout::kRotated, kBlockBytes, 1024},
                            {Layout::kApart, Layout::kApartBytes, 1024},
                            {Layout::kQueried, 8, 8},
                            {Layout::kCounts, 16, 8}};
  for (unsigned place = 0; place < kPlaces; ++place) {
    all.push_back({Layout::tile(place), Layout::kTileBytes, 1024});
    all.push_back({Layout::numbers(place), kTile * sizeof(float), 16});
    all.push_back({Layout::weighed(place), 8, 8});
    all.push_back({Layout::released(place), 8, 8});
    for (unsigned chunk = 0; chunk < Layout::kChunks; ++chunk) {
      all.push_back({Layout::fetched(place, chunk), 8, 8});
    }
  }
  std::sort(all.begin(), all.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("what attention keeps in shared memory has its own aligned place", "",
                   (AttentionLayout<512, 64>), (AttentionLayout<64, 16>)) {
  unsigned end = 0;
  for (const Range& range : ranges<TestType>()) {
    CAPTURE(range.begin, range.bytes, end);
    CHECK(range.begin >= end);
    CHECK(range.begin % range.alignment == 0);
    end = range.begin + range.bytes;
  }
  CHECK(end == TestType::kBytes);
  constexpr unsigned kMost = 227 * 1024;  // of a block of compute capability 9.0
  CHECK(end <= kMost);
}

TEMPLATE_TEST_CASE("rows of results can be copied, and meet other banks than those beside them", "",
                   (AttentionLayout<512, 64>), (AttentionLayout<64, 16>)) {
  for (const unsigned element : {2U, 4U}) {
    CAPTURE(element);
    CHECK(TestType::result_row(element) % 16 == 0);
    CHECK(TestType::result_row(element) / 4 % 32 == element * 2);
    CHECK(kTile * TestType::result_row(element) <= TestType::kRotated);
  }
}

TEMPLATE_TEST_CASE("the weights of a tile take the place of its rotated columns", "",
                   (AttentionLayout<512, 64>), (AttentionLayout<64, 16>)) {
  for (unsigned place = 0; place < kPlaces; ++place) {
    CHECK(TestType::weights(place) == TestType::tile(place) + TestType::step(TestType::kSteps));
    CHECK(TestType::weights(place) + kBlockBytes == TestType::tile(place) + TestType::kTileBytes);
  }
}
