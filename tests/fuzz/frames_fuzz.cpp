// SPDX-License-Identifier: Apache-2.0
// The readers of bytes from outside, with random bytes.

#include "driver.hpp"
#include "frames.hpp"

#include <vector>

namespace cohort::fuzz {
namespace {

/// Mostly small numbers, which choose among the cases, and many zeros, which change nothing.
void round(Random& random, std::string& words) {
  for (int i = 0; i < 50; ++i) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(random.between(0, 200)));
    for (auto& byte : bytes) {
      byte =
          static_cast<std::byte>(random.one_in(3) ? random.between(0, 255) : random.between(0, 15));
    }
    words = "bytes";
    constexpr char kDigits[] = "0123456789abcdef";
    for (const auto byte : bytes) {
      words += {' ', kDigits[static_cast<int>(byte) >> 4], kDigits[static_cast<int>(byte) & 15]};
    }
    read_frames(bytes);
  }
}

}  // namespace
}  // namespace cohort::fuzz

int main(int argc, char** argv) {
  return cohort::fuzz::drive(argc, argv, "frames", 200, cohort::fuzz::round);
}
