// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/visibility_guard.hpp"

#include "support/catch.hpp"

using namespace cohort;

namespace {

/// One NCCL: how many registered buffers its symmetric path asks for, and whether it needs a guard.
struct Version {
  int code;
  int buffers;  ///< 3: it has no symmetric path.
  bool guard;
};

// Every release that has a wheel.
constexpr Version kVersions[] = {
    {21903, 3, false}, {22005, 3, false}, {22105, 3, false}, {22203, 3, false}, {22304, 3, false},
    {22403, 3, false}, {22501, 3, false}, {22602, 3, false}, {22605, 3, false}, {22703, 2, false},
    {22705, 2, false}, {22706, 2, false}, {22707, 2, false}, {22803, 2, true},  {22807, 2, true},
    {22809, 2, true},  {22902, 1, true},  {22903, 1, true},  {22907, 1, true},  {23003, 1, true},
    {23004, 1, true},  {23007, 1, false}, {23102, 1, false}, {23203, 1, false},
};

}  // namespace

TEST_CASE("the symmetric path follows the version and the buffers in windows",
          "[visibility_guard]") {
  for (const Version& version : kVersions) {
    for (const bool in : {false, true}) {
      for (const bool out : {false, true}) {
        CAPTURE(version.code, in, out);
        const int buffers = (in ? 1 : 0) + (out ? 1 : 0);
        const SymmetricPath expected = buffers < version.buffers ? SymmetricPath::never
                                       : buffers == 2            ? SymmetricPath::certain
                                       : buffers == 1            ? SymmetricPath::possible
                                                                 : SymmetricPath::never;
        CHECK(symmetric_path(version.code, {in, out}) == expected);
        CHECK(needs_visibility_guard(version.code, expected) ==
              (version.guard && expected != SymmetricPath::never));
      }
    }
  }
}

TEST_CASE("a process that asks for symmetric kernels gets them without windows",
          "[visibility_guard]") {
  for (const Version& version : kVersions) {
    CAPTURE(version.code);
    CHECK(symmetric_path(version.code, {false, false}, true) ==
          (version.buffers == 1 ? SymmetricPath::possible : SymmetricPath::never));
    CHECK(symmetric_path(version.code, {true, true}, true) ==
          (version.buffers == 3 ? SymmetricPath::never : SymmetricPath::certain));
  }
}

TEST_CASE("one registered buffer needs the guard where the path takes it", "[visibility_guard]") {
  // With 2.29.7 and a guard for two buffers only, a staged merge had 1,332,992 wrong elements.
  STATIC_REQUIRE(needs_visibility_guard(22907, symmetric_path(22907, {false, true})));
  STATIC_REQUIRE(needs_visibility_guard(22907, symmetric_path(22907, {true, false})));
  STATIC_REQUIRE_FALSE(needs_visibility_guard(22803, symmetric_path(22803, {true, false})));
  STATIC_REQUIRE_FALSE(needs_visibility_guard(22907, symmetric_path(22907, {false, false})));
}
